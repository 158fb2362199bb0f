"""What the doctor finds, and what it advises."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_jit.cli import doctor
from rwkv_jit.cli.doctor import examine
from rwkv_jit.cli.toolchain_checks import Check
from rwkv_jit.cli.trial import Trial
from rwkv_jit.errors import KernelBuildError
from rwkv_jit.settings import current_settings


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    """Tests set variables; settings are read once in a process."""
    current_settings.cache_clear()
    yield
    current_settings.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(doctor, "gpu_archs", lambda: ())
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", Path("/nonexistent"))


def found(*, build: bool = False) -> dict[str, Check]:
    """The checks by name, each as it should be: right, or wrong with advice."""
    checks = list(examine(build=build))
    for check in checks:
        assert (check.status == "ok") == (check.fix == ""), check
    return {check.name: check for check in checks}


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Make torch say that there is one GPU."""
    import torch

    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": "Some GPU",
        "get_device_properties": SimpleNamespace(total_memory=8 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


@pytest.mark.usefixtures("no_gpu")
def test_a_machine_that_runs_these_tests_is_well() -> None:
    checks = found()
    assert [name for name, check in checks.items() if check.status == "error"] == []
    assert set(checks) >= {"settings", "python", "torch", "gpu", "cpu", "ninja", "host compiler"}
    assert set(checks) >= {"nvcc", "memory", "cache"}
    assert "trial" not in checks


@pytest.mark.usefixtures("no_gpu")
def test_no_host_compiler_is_an_error_unless_nothing_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = found()["host compiler"]
    assert check.status == "error"
    assert "CXX='no-such-compiler' is not a program" in check.fix
    monkeypatch.setenv("RWKV_JIT_MODE", "prebuilt")
    current_settings.cache_clear()
    assert found()["host compiler"].status == "warning"


@pytest.mark.usefixtures("no_gpu")
def test_no_nvcc_is_well_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    check = found()["nvcc"]
    assert (check.status, check.value) == ("ok", "none; needed only to build for a GPU")


def test_no_nvcc_is_an_error_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    checks = found()
    assert checks["gpu 0"].value == "Some GPU, compute capability 9.0, 8 GiB"
    assert checks["nvcc"].status == "error"
    assert "is not a CUDA toolkit" in checks["nvcc"].fix


def test_a_gpu_that_is_too_old_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (7, 5))
    check = found()["gpu 0"]
    assert check.status == "error"
    assert "8.0 or later" in check.fix


def test_a_driver_without_a_usable_gpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(doctor, "gpu_archs", lambda: ())
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: None)
    assert "install a CUDA build of torch" in found()["torch"].fix
    monkeypatch.setattr(doctor, "torch_cuda_version", lambda: "13.0")
    checks = found()
    assert (checks["torch"].status, checks["gpu"].status) == ("ok", "warning")


@pytest.mark.usefixtures("no_gpu")
def test_a_module_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> object:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setenv("PATH", "")
    checks = found(build=True)
    assert checks["torch"].value == "not usable: no torch"
    assert {checks["torch"].status, checks["ninja"].status} == {"error"}
    assert "trial" not in checks


@pytest.mark.usefixtures("no_gpu")
def test_an_unknown_setting_is_an_error_and_the_rest_is_still_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RWKV_JIT_MODE", "sometimes")
    checks = found()
    assert checks["settings"].status == "error"
    assert "choose from auto, prebuilt" in checks["settings"].fix
    assert "cache" in checks


@pytest.mark.usefixtures("no_gpu")
def test_a_cache_that_others_can_write_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("RWKV_JIT_CACHE_DIR", str(tmp_path))
    check = found()["cache"]
    assert check.status == "error"
    assert "can be written by others" in check.fix


@pytest.mark.usefixtures("no_gpu")
def test_a_cache_that_cannot_be_made_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RWKV_JIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check = found()["cache"]
    assert check.status == "warning"
    assert "set RWKV_JIT_CACHE_DIR" in check.fix


@pytest.mark.usefixtures("no_gpu")
def test_looking_makes_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RWKV_JIT_CACHE_DIR", str(tmp_path / "cache"))
    assert found()["cache"].status == "ok"
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_gpu")
def test_a_trial_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Trial:
        raise KernelBuildError("g++ failed")

    monkeypatch.setattr(doctor, "run_trial", fail)
    assert found(build=True)["trial"].fix == "g++ failed"
    wrong = Trial(slug="wkv7", build_seconds=1.0, worst="dw", error=0.5, limit=1e-4)
    monkeypatch.setattr(doctor, "run_trial", lambda *_: wrong)
    check = found(build=True)["trial"]
    assert check.status == "error"
    assert "5.0e-01 (of dw; at most 1e-04)" in check.value


@pytest.mark.usefixtures("no_gpu")
def test_no_trial_where_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_JIT_MODE", "reference")
    checks = found(build=True)
    assert (checks["trial"].status, checks["settings"].status) == ("warning", "warning")
