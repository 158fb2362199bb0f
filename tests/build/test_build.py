"""Obtaining kernels: once per key, whoever asks, and what is said where none can be had."""

from __future__ import annotations

import dataclasses
import errno
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_sources import CPU_SLUG, kernel_source
from locking import lock_held_elsewhere
from rwkv_jit import toolchain
from rwkv_jit.build import BuildResult, attempt, build_many, obtain, warm_command
from rwkv_jit.build import build as build_module
from rwkv_jit.cache import Cache, CacheEntry, cache_key
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import CacheError, KernelBuildError, KernelMissingError, ToolchainError
from rwkv_jit.settings import Settings

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("c++") is None, reason="needs an x86-64 compiler"
)
OPTIONS = (
    "--head-size 64 --dtype fp32 --arch aarch64 --decay log --state-dtype fp16 --state-layout kv"
)


def no_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_arch: str, _settings: Settings) -> toolchain.Toolchain:
        raise ToolchainError("no compiler")

    monkeypatch.setattr(build_module, "find_toolchain", refuse)


def test_second_call_starts_no_worker_and_says_nothing(
    built: tuple[Settings, CacheEntry],
    starts: list[float],
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings, entry = built
    assert obtain(kernel_source(), dataclasses.replace(settings, log_level="info")) == entry
    assert starts == []
    assert capfd.readouterr() == ("", "")


def test_prebuilt_mode_and_policy_never_use_what_is_there(
    built: tuple[Settings, CacheEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, entry = built
    assert obtain(kernel_source(), settings, policy="never") == entry
    assert obtain(kernel_source(), dataclasses.replace(settings, mode="prebuilt")) == entry


def test_without_a_compiler_an_entry_is_found_by_meaning(
    built: tuple[Settings, CacheEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, entry = built
    no_toolchain(monkeypatch)
    assert obtain(kernel_source(), settings) == entry
    assert obtain(kernel_source(), settings, policy="never") == entry
    with pytest.raises(ToolchainError, match="no compiler"):
        obtain(kernel_source(extra="// another"), settings)


def test_miss_where_building_is_forbidden_names_the_remedy(settings: Settings) -> None:
    remedy = "rwkv-jit warm wkv7 --head-size 64 --dtype fp32 --arch x86_64_v2"
    with pytest.raises(KernelMissingError, match=f"the caller forbids .*: {remedy}$"):
        obtain(kernel_source(), settings, policy="never")
    prebuilt = dataclasses.replace(settings, mode="prebuilt")
    with pytest.raises(KernelMissingError, match=f"RWKV_JIT_MODE=prebuilt forbids .*: {remedy}$"):
        obtain(kernel_source(), prebuilt)
    with pytest.raises(KernelMissingError):
        obtain(kernel_source(), prebuilt, policy="always")
    assert settings.cache_dir is not None
    assert not settings.cache_dir.exists()


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("wkv7_n64_bf16_l16_sm90a", "--head-size 64 --dtype bf16 --arch 9.0a"),
        ("wkv6_n128_fp16_l32_sm80", "--head-size 128 --dtype fp16 --arch 8.0 --chunk-length 32"),
        (
            "wkv7_n64_fp32_l16_aarch64_log_sfp16_kv",
            OPTIONS,
        ),
        (
            "wkv7_n64_bf16_l16_sm90a_cbf16_bounded",
            "--head-size 64 --dtype bf16 --arch 9.0a --checkpoint-dtype bf16 --lower-bound -8",
        ),
        (
            "wkv7_n64_fp32_l16_sm90a_tf32_bounded",
            "--head-size 64 --dtype fp32 --arch 9.0a --precision tf32 --lower-bound -8",
        ),
    ],
)
def test_warm_command_has_options_that_differ_from_defaults(slug: str, options: str) -> None:
    config = OpConfig.parse(slug)
    assert warm_command(config) == f"rwkv-jit warm {config.op} {options}"


def test_unknown_policy_is_an_error(settings: Settings) -> None:
    with pytest.raises(ValueError, match="policy='sometimes' is not known"):
        obtain(kernel_source(), settings, policy="sometimes")


def test_policy_always_replaces_and_mode_rebuild_does_so_once_per_process(
    settings: Settings, starts: list[float]
) -> None:
    rebuild = dataclasses.replace(settings, mode="rebuild")
    first = obtain(kernel_source(), settings, policy="always")
    second = obtain(kernel_source(), settings, policy="always")
    assert second.path == first.path
    assert second.manifest.created > first.manifest.created
    assert obtain(kernel_source(), rebuild) == second
    assert len(starts) == 2


def test_mode_rebuild_builds_what_another_process_left(
    built: tuple[Settings, CacheEntry], settings: Settings
) -> None:
    assert built[0].cache_dir is not None
    assert settings.cache_dir is not None
    shutil.copytree(built[0].cache_dir, settings.cache_dir)
    rebuild = dataclasses.replace(settings, mode="rebuild")
    entry = obtain(kernel_source(), rebuild)
    assert entry.manifest.created > built[1].manifest.created
    assert obtain(kernel_source(), rebuild) == entry


def test_threads_that_ask_at_once_start_one_worker(settings: Settings, starts: list[float]) -> None:
    found: list[CacheEntry] = []
    threads = [
        threading.Thread(target=lambda: found.append(obtain(kernel_source(), settings)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 1
    assert found == [found[0]] * 4


def test_processes_that_ask_at_once_build_once(settings: Settings) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from kernel_sources import kernel_source; from rwkv_jit.build import obtain\n"
        "from rwkv_jit.settings import Settings\n"
        "settings = Settings(cache_dir=Path(sys.argv[1]))\n"
        "print(obtain(kernel_source(), settings).manifest.created)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(settings.cache_dir)],
            cwd=TESTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    assert said[0][0] == said[1][0]
    assert sum("built " in errors for _, errors in said) == 1


def test_full_disk_is_an_error_that_names_the_cache(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attempt, "run_worker", refuse)
    with (
        pytest.warns(RuntimeWarning, match=r"has no space left .* for this process only") as caught,
        pytest.raises(CacheError, match=r"No space left on device; .*RWKV_JIT_CACHE_DIR"),
    ):
        obtain(kernel_source(), settings)
    assert len(caught) == 1


def test_many_sources_give_results_in_their_order(settings: Settings) -> None:
    good, bad = kernel_source(), kernel_source(extra="int x = foo;")
    seen: dict[int, BuildResult] = {}
    results = build_many([bad, good], settings, jobs=2, on_result=seen.__setitem__)
    assert isinstance(results[0], KernelBuildError)
    assert isinstance(results[1], CacheEntry)
    assert seen == dict(enumerate(results))
    assert build_many([], settings) == []


@pytest.fixture
def lock_of_another_process(settings: Settings) -> Iterator[None]:
    """A process that holds the build lock of `kernel_source()` and builds nothing."""
    chosen = toolchain.find_toolchain(kernel_source().config.arch, settings)
    digest = cache_key(kernel_source(), chosen).digest
    with lock_held_elsewhere(Cache.open(settings).root, digest):
        yield


@pytest.mark.usefixtures("lock_of_another_process")
def test_a_build_that_waits_for_another_process_can_be_stopped(
    settings: Settings, starts: list[float]
) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.5, stop.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(KernelBuildError, match=f"^{CPU_SLUG}.forward: the build was stopped$"):
        obtain(kernel_source(), settings, stop=stop)
    timer.join()
    assert 0.4 < time.monotonic() - began < 5
    assert starts == []
