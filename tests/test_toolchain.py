"""Finding compilers, and what they are called."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_sources import CUDA_SLUG, kernel_source
from rwkv_jit import compilers
from rwkv_jit.build import obtain
from rwkv_jit.compilers import is_toolkit, torch_cuda_version
from rwkv_jit.errors import ToolchainError
from rwkv_jit.settings import Settings
from rwkv_jit.toolchain import find_toolchain

HAS_NVCC = shutil.which("nvcc") is not None
X86 = platform.machine() == "x86_64"
needs_x86 = pytest.mark.skipif(not X86, reason="flags of x86-64")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_host(folder: Path, name: str = "c++", version: str = "12.2.0") -> Path:
    answer = f'[ "$1" = -dumpmachine ] && echo {platform.machine()}-linux-gnu && exit'
    return program(folder / name, f'{answer}\necho "{name} (Debian) {version}"')


def fake_toolkit(root: Path, release: str = "13.0") -> Path:
    program(root / "bin" / "nvcc", f'echo "Cuda compilation tools, release {release}, V{release}"')
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    return root


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one empty folder, no toolkit elsewhere, a CPU build of torch."""
    path = tmp_path / "path"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(compilers, "_DEFAULT_CUDA_HOME", tmp_path / "none")
    monkeypatch.setattr(compilers, "_pip_homes", list)
    monkeypatch.setattr(compilers, "torch_cuda_version", lambda: None)
    return path


def test_no_compiler_is_an_error_that_names_the_ways_out(alone: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        find_toolchain("x86_64_v3", Settings())
    ways = (
        "g++", "CXX", "rwkv-jit warm", "RWKV_JIT_CACHE_DIR", "RWKV_JIT_BUNDLE_PATH",
        "RWKV_JIT_MODE=reference",
    )  # fmt: skip
    for way in ways:
        assert way in str(caught.value)


def test_no_nvcc_is_an_error_that_names_the_cuda_extra(alone: Path) -> None:
    fake_host(alone)
    with pytest.raises(
        ToolchainError, match=r"no nvcc .*rwkv_jit\[cuda\].*RWKV_JIT_MODE=reference"
    ):
        find_toolchain("sm90a", Settings())


def test_cxx_that_is_no_program_is_an_error(alone: Path) -> None:
    with pytest.raises(ToolchainError, match="CXX='nothing' is not a program"):
        find_toolchain("x86_64_v3", Settings(cxx="nothing"))


def test_host_identity_does_not_depend_on_name_or_folder(alone: Path, tmp_path: Path) -> None:
    fake_host(alone)
    other = fake_host(tmp_path / "other", "g++-12")
    arch = "x86_64_v3" if X86 else "aarch64"
    first = find_toolchain(arch, Settings())
    second = find_toolchain(arch, Settings(cxx=str(other)))
    assert first.host_compiler != second.host_compiler
    assert first.host_identity == second.host_identity
    assert first.host_identity == f"gcc (Debian) 12.2.0 {platform.machine()}-linux-gnu"


def test_a_replaced_compiler_is_asked_again(alone: Path) -> None:
    arch = "x86_64_v3" if X86 else "aarch64"
    fake_host(alone, version="12.2.0")
    before = find_toolchain(arch, Settings()).host_identity
    fake_host(alone, version="12.10.0")
    assert find_toolchain(arch, Settings()).host_identity != before


def test_wrapper_script_leads_to_its_toolkit(alone: Path, tmp_path: Path) -> None:
    fake_host(alone)
    root = fake_toolkit(tmp_path / "cuda")
    program(
        root / "bin" / "nvcc",
        f'if [ "$1" = --dryrun ]; then echo "#$ TOP={root}/bin/.."; else echo "release 13.0"; fi',
    )
    program(alone / "nvcc", f'exec {root}/bin/nvcc "$@"')
    assert find_toolchain("sm90a", Settings()).cuda_home == root


def test_link_on_path_leads_to_its_toolkit(alone: Path, tmp_path: Path) -> None:
    fake_host(alone)
    root = fake_toolkit(tmp_path / "cuda")
    (alone / "nvcc").symlink_to(root / "bin" / "nvcc")
    assert find_toolchain("sm90a", Settings()).cuda_home == root


def test_cuda_home_that_is_no_toolkit_is_an_error(alone: Path, tmp_path: Path) -> None:
    fake_host(alone)
    with pytest.raises(ToolchainError, match="is not a CUDA toolkit"):
        find_toolchain("sm90a", Settings(cuda_home=tmp_path))


def test_nvcc_of_another_major_than_torch_is_an_error(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_host(alone)
    root = fake_toolkit(tmp_path / "cuda", "12.8")
    monkeypatch.setattr(compilers, "torch_cuda_version", lambda: "13.0")
    with pytest.raises(ToolchainError, match=r"is of CUDA 12\.8, but torch was built with CUDA 13"):
        find_toolchain("sm90a", Settings(cuda_home=root))


def test_toolkit_that_fits_torch_is_preferred_to_an_earlier_one(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_host(alone)
    older, fitting = fake_toolkit(tmp_path / "old", "12.8"), fake_toolkit(tmp_path / "new", "13.0")
    monkeypatch.setattr(compilers, "_DEFAULT_CUDA_HOME", older)
    monkeypatch.setattr(compilers, "_pip_homes", lambda: [fitting])
    monkeypatch.setattr(compilers, "torch_cuda_version", lambda: "13.0")
    assert find_toolchain("sm90a", Settings()).cuda_home == fitting


def test_headers_of_a_target_make_a_toolkit(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvcc", "")
    assert not is_toolkit(tmp_path)
    headers = tmp_path / "targets" / "x86_64-linux" / "include"
    headers.mkdir(parents=True)
    (headers / "cuda_runtime.h").touch()
    assert is_toolkit(tmp_path)


def test_compiler_that_fails_is_an_error_with_its_words(alone: Path) -> None:
    program(alone / "c++", "echo broken; exit 3")
    with pytest.raises(ToolchainError, match=r"failed \(exit 3\): broken"):
        find_toolchain("x86_64_v3", Settings())


@needs_x86
def test_cpu_of_another_kind_is_an_error(alone: Path) -> None:
    fake_host(alone)
    with pytest.raises(ToolchainError, match="arch=aarch64 cannot be built here"):
        find_toolchain("aarch64", Settings())


@needs_x86
def test_cpu_flags_name_the_level_and_never_native() -> None:
    found = find_toolchain("x86_64_v3", Settings())
    assert "-march=x86-64-v3" in found.code_flags
    assert (found.nvcc, found.cuda_home, found.cuda_major) == (None, None, 0)
    assert found.library_dirs == ()


@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
def test_cuda_flags_name_the_architecture() -> None:
    found = find_toolchain("sm90a", Settings())
    assert "-gencode=arch=compute_90a,code=sm_90a" in found.code_flags
    assert found.cuda_home is not None
    assert is_toolkit(found.cuda_home)
    assert found.nvcc_identity.startswith("nvcc Cuda compilation tools, release ")
    assert "/usr" not in found.nvcc_identity + found.host_identity


def test_torch_cuda_version_is_what_torch_says() -> None:
    import torch

    assert torch_cuda_version() == torch.version.cuda


def test_finding_compilers_does_not_import_torch() -> None:
    code = (
        "import sys; import rwkv_jit.toolchain;"
        "from rwkv_jit.compilers import torch_cuda_version; torch_cuda_version();"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(compilers.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def pip_packages() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [root for folder in folders for root in Path(folder).glob("cu*") if is_toolkit(root)]


@pytest.mark.skipif(not pip_packages(), reason="needs NVIDIA's pip packages (extra cuda)")
def test_pip_packages_build_without_a_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "path"
    path.mkdir()
    for name in ("c++", "g++", "gcc", "cc1plus", "as", "ld", "sh"):
        found = shutil.which(name)
        if found is not None:
            (path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(compilers, "_DEFAULT_CUDA_HOME", tmp_path / "none")
    settings = Settings(cache_dir=tmp_path / "cache", log_level="quiet")
    found_toolchain = find_toolchain("sm90a", settings)
    assert found_toolchain.cuda_home in pip_packages()
    entry = obtain(kernel_source(CUDA_SLUG), settings)
    assert str(found_toolchain.cuda_home) in entry.manifest.command
    assert dataclasses.replace(found_toolchain, cuda_home=None).library_dirs == ()
