"""Where bundles are looked for, and what happens to one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from bundles import fake_bundle
from rwkv_jit.bundle import bundles_in_force, install_folder, places
from rwkv_jit.bundle.archive import copy_bundle
from rwkv_jit.errors import BundleError
from rwkv_jit.settings import Settings

NAME = "wkv7_n64_fp32_l16_x86_64_v3"


def settings_of(tmp_path: Path, *path: Path, mode: str = "auto") -> Settings:
    return Settings(cache_dir=tmp_path / "cache", bundle_path=path, mode=mode)


def test_the_variable_holds_several_in_order() -> None:
    settings = Settings.from_environment(
        {"RWKV_JIT_BUNDLE_PATH": "/a::/b:", "RWKV_JIT_BUNDLE_KEYS": "/k.pub"}
    )
    assert settings.bundle_path == (Path("/a"), Path("/b"))
    assert settings.bundle_keys == (Path("/k.pub"),)
    assert Settings.from_environment({}).bundle_path == ()


def test_the_path_comes_before_what_was_installed(tmp_path: Path) -> None:
    first, second = (fake_bundle(tmp_path / name, [NAME]) for name in ("z", "a"))
    settings = settings_of(tmp_path, first.root, second.root)
    installed = copy_bundle(second, install_folder(settings) / "third", replace=False)
    found = [bundle.root for bundle in bundles_in_force(settings)]
    assert found == [first.root, second.root, installed.root]
    assert [place.source for place in places(settings)] == ["path", "path", "installed"]


@pytest.mark.parametrize("mode", ["auto", "prebuilt"])
def test_one_of_the_path_that_is_none_is_an_error(tmp_path: Path, mode: str) -> None:
    settings = settings_of(tmp_path, tmp_path / "missing", mode=mode)
    with pytest.raises(BundleError, match="missing is not a bundle"):
        bundles_in_force(settings)


def test_an_installed_one_that_is_none_is_left_out_with_one_warning(tmp_path: Path) -> None:
    good = fake_bundle(tmp_path / "good", [NAME])
    settings = settings_of(tmp_path, good.root)
    (install_folder(settings) / "bad").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="it is left out") as caught:
        assert len(bundles_in_force(settings)) == 1
    assert len(caught) == 1
    with pytest.raises(BundleError):
        bundles_in_force(settings_of(tmp_path, good.root, mode="prebuilt"))


def test_without_bundles_nothing_is_made(tmp_path: Path) -> None:
    assert bundles_in_force(settings_of(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_shared_bundle_is_used_where_sharing_is_allowed(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [NAME])
    bundle.root.chmod(0o777)
    with pytest.raises(BundleError, match="RWKV_JIT_ALLOW_SHARED_CACHE=1"):
        bundles_in_force(settings_of(tmp_path, bundle.root))
    allowed = Settings(
        cache_dir=tmp_path / "cache", bundle_path=(bundle.root,), allow_shared_cache=True
    )
    assert len(bundles_in_force(allowed)) == 1
