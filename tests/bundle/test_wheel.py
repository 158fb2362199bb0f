"""Wheels: a bundle as a Python package that pip installs and that is found without its code."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bundles import contents, fake_bundle, fake_entry
from rwkv_jit.bundle import Bundle
from rwkv_jit.bundle.make import write_bundle
from rwkv_jit.bundle.wheel import write_wheel
from rwkv_jit.errors import BundleError

NAME = "wkv7_n64_fp32_l16_x86_64_v3"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fake_bundle(tmp_path / "bundle", [NAME, "wkv7_n64_bf16_l16_sm90a"])


def test_equal_bundles_give_equal_wheels(tmp_path: Path, bundle: Bundle) -> None:
    first, second = (
        write_wheel(bundle, tmp_path / name, name="My-Kernels", version="1.2")
        for name in ("first", "second")
    )
    assert first.name == "my_kernels-1.2-py3-none-linux_x86_64.whl"
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None


def test_pip_installs_it_and_its_bundle_is_found_unimported(tmp_path: Path, bundle: Bundle) -> None:
    wheel = write_wheel(bundle, tmp_path, name="our-kernels", version="0")
    site = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--disable-pip-version-check", "--root-user-action=ignore", "--target", site, wheel),
        ],
        check=True,
    )
    assert contents(site / "our_kernels" / "bundle") == contents(bundle.root)
    program = (
        "import sys\n"
        "from rwkv_jit.bundle import bundles_in_force, places\n"
        "from rwkv_jit.settings import current_settings\n"
        "(bundle,) = bundles_in_force(current_settings())\n"
        "print(places(current_settings())[0].source, bundle.root)\n"
        "assert 'our_kernels' not in sys.modules\n"
    )
    # A package directory that others can write is for Python to judge.
    (site / "our_kernels" / "bundle").chmod(0o775)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["package", str(site / "our_kernels" / "bundle")]


@pytest.mark.parametrize(
    ("name", "version"),
    [("../x", "1"), ("", "1"), ("a b", "1"), ("1x", "1"), ("x", "../1"), ("x", ""), ("x", "1-2")],
)
def test_names_and_versions_that_are_none_are_refused(
    tmp_path: Path, bundle: Bundle, name: str, version: str
) -> None:
    with pytest.raises(BundleError):
        write_wheel(bundle, tmp_path / "out", name=name, version=version)
    assert not (tmp_path / "out").exists()


def test_a_wheel_is_for_one_platform(tmp_path: Path) -> None:
    entries = [
        fake_entry(tmp_path / "entries", NAME),
        fake_entry(tmp_path / "entries", NAME, fields={"platform": "linux-aarch64"}),
    ]
    bundle = write_bundle(entries, tmp_path / "bundle")
    with pytest.raises(BundleError, match="2 platforms"):
        write_wheel(bundle, tmp_path, name="x", version="1")
