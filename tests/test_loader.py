"""Loading: a cached library that is not what its entry says is built again, or refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from rwkv_jit import loader
from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.build import obtain
from rwkv_jit.cache import hash_file
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import KernelLoadError, ToolchainError
from rwkv_jit.ops import get_spec
from rwkv_jit.render import render
from rwkv_jit.settings import Settings, current_settings
from rwkv_jit.toolchain import find_toolchain


def slug(size: int) -> str:
    return f"wkv7_n{size}_fp32_l16_{host_cpu_arch()}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A cache whose entry for head size 16 holds the library of head size 24, hashes and all."""
    settings = dataclasses.replace(current_settings(), cache_dir=tmp_path / "cache")
    spec = get_spec("wkv7")
    wrong, other = (
        obtain(render(spec, OpConfig.parse(slug(size)), "forward"), settings) for size in (16, 24)
    )
    manifest = wrong.path / "manifest.json"
    for path in (wrong.path, wrong.library, manifest):
        path.chmod(0o700)
    shutil.copyfile(other.library, wrong.library)
    size, digest = wrong.library.stat().st_size, hash_file(wrong.library)
    changed = dataclasses.replace(wrong.manifest, size=size, sha256=digest)
    manifest.write_text(changed.to_json())
    return settings


def test_a_cached_library_of_another_configuration_is_built_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "current_settings", lambda: settings)
    with pytest.warns(RuntimeWarning, match="says it is wkv7_n24.*; it is built again"):
        kernel = loader.KernelTable().get(slug(16), "forward")
    assert kernel.identity == f"{slug(16)}.forward"
    assert loader.KernelTable().get(slug(16), "forward").identity == kernel.identity


def test_in_prebuilt_mode_it_is_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidding = dataclasses.replace(settings, mode="prebuilt")
    monkeypatch.setattr(loader, "current_settings", lambda: forbidding)
    with pytest.raises(KernelLoadError, match="says it is wkv7_n24"):
        loader.KernelTable().get(slug(16), "forward")


def test_a_kernel_for_a_gpu_is_built_and_loaded_where_there_is_none() -> None:
    try:
        find_toolchain("sm90a", current_settings())
    except ToolchainError as error:
        pytest.skip(f"no CUDA compiler: {error}")
    kernel = loader.KernelTable().get("wkv7_n16_fp32_l16_sm90a", "forward")
    assert kernel.identity == "wkv7_n16_fp32_l16_sm90a.forward"
