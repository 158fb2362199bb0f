"""Building: once per key, whoever asks, and what is said when it fails."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernel_sources import CPU_SLUG, CUDA_SLUG, kernel_source
from rwkv_jit import build as build_module
from rwkv_jit import toolchain
from rwkv_jit.build import BuildResult, build_many, obtain, warm_command
from rwkv_jit.cache import Cache, CacheEntry
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import CacheError, KernelBuildError, KernelMissingError, ToolchainError
from rwkv_jit.render import RenderedSource
from rwkv_jit.settings import Settings

ROOT = Path(build_module.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("c++") is None, reason="needs an x86-64 compiler"
)
OPTIONS = (
    "--head-size 64 --dtype fp32 --arch aarch64 --decay log --state-dtype fp16 --state-layout kv"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # The blank is part of the test: compilers, ninja and the linker must all bear it.
    return Settings(cache_dir=tmp_path / "the cache", log_level="quiet")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, CacheEntry]:
    """A cache in which `kernel_source()` is built."""
    settings = Settings(cache_dir=tmp_path_factory.mktemp("built"), log_level="quiet")
    return settings, obtain(kernel_source(), settings)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One item for each worker that is started from here on."""
    started: list[float] = []
    real = build_module.run_worker

    def counting(*args: object, **kwargs: object) -> int:
        started.append(time.monotonic())
        return real(*args, **kwargs)

    monkeypatch.setattr(build_module, "run_worker", counting)
    return started


def no_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_arch: str, _settings: Settings) -> toolchain.Toolchain:
        raise ToolchainError("no compiler")

    monkeypatch.setattr(build_module, "find_toolchain", refuse)


def needed_libraries(library: Path) -> list[str]:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    text = subprocess.run(
        [readelf, "-d", library], capture_output=True, text=True, check=True
    ).stdout
    return [line.partition("[")[2].rstrip("]") for line in text.splitlines() if "NEEDED" in line]


def test_entry_holds_library_source_log_and_what_was_done(
    built: tuple[Settings, CacheEntry],
) -> None:
    _, entry = built
    library = ctypes.CDLL(str(entry.library))
    library.rwkv_jit_identity.restype = ctypes.c_char_p
    assert library.rwkv_jit_identity().decode() == entry.manifest.identity == f"{CPU_SLUG}.forward"
    assert entry.source.read_text() == kernel_source().text
    assert "-march=x86-64-v2" in entry.manifest.command
    assert entry.manifest.command in entry.log.read_text()
    assert entry.manifest.build_seconds > 0
    assert sorted(path.name for path in entry.path.iterdir()) == [
        "build.log",
        "kernel.so",
        "manifest.json",
        "source.cpp",
    ]


def test_library_needs_nothing_of_torch(built: tuple[Settings, CacheEntry]) -> None:
    allowed = ("libc.", "libm.", "libgcc_s.", "libstdc++.")
    assert all(name.startswith(allowed) for name in needed_libraries(built[1].library))


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
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from kernel_sources import kernel_source; from rwkv_jit.build import obtain\n"
        "from rwkv_jit.settings import Settings\n"
        "settings = Settings(cache_dir=Path(sys.argv[1]))\n"
        "print(obtain(kernel_source(), settings).manifest.created)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(settings.cache_dir)],
            cwd=ROOT,
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


def test_progress_is_shown_on_standard_error(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    obtain(kernel_source(), dataclasses.replace(settings, log_level="info"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"rwkv_jit: building {CPU_SLUG}.forward ...\n" in captured.err
    assert f"rwkv_jit: built {CPU_SLUG}.forward in " in captured.err


def failure(source: RenderedSource, settings: Settings, limit: float = 120.0) -> str:
    """The message of the build's error, after a look at what it left behind."""
    with pytest.raises(KernelBuildError) as caught:
        obtain(source, settings, limit=limit)
    assert settings.cache_dir is not None
    base = settings.cache_dir / "v1"
    assert list((base / "staging").iterdir()) == []
    assert list((base / "entries").iterdir()) == []
    assert len(list((base / "failed").iterdir())) == 1
    return str(caught.value)


def test_compiler_error_is_told_with_its_place_and_the_log(settings: Settings) -> None:
    message = failure(kernel_source(extra="int x = foo;"), settings)
    assert message.startswith(f"{CPU_SLUG}.forward: c++ failed (exit 1): source.cpp:")
    assert "'foo' was not declared" in message
    assert "Command: " in message
    log = Path(message.partition("Full log: ")[2].partition("\n")[0])
    assert "'foo' was not declared" in log.read_text()


def test_missing_header_gives_a_hint(settings: Settings) -> None:
    assert "A header is missing" in failure(kernel_source(extra="#include <no_such.h>"), settings)


def test_symbol_of_torch_is_a_link_error(settings: Settings) -> None:
    extra = (
        'extern "C" void THPModule_initExtension(); EXPORT void f() {THPModule_initExtension();}'
    )
    message = failure(kernel_source(extra=extra), settings)
    assert "the linker failed (exit 1)" in message
    assert "undefined reference to `THPModule_initExtension'" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (kernel_source(says="wkv9"), "says it is 'wkv9' instead of"),
        (kernel_source(abi=999), "launcher ABI 999 instead of"),
        (
            dataclasses.replace(kernel_source(), text="int nothing;"),
            "undefined symbol: rwkv_jit_identity",
        ),
    ],
    ids=["identity", "abi", "exports"],
)
def test_library_that_is_not_what_was_asked_for_is_refused(
    settings: Settings, source: RenderedSource, expected: str
) -> None:
    assert expected in failure(source, settings)


def test_stopped_build_takes_its_compilers_along(settings: Settings, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    slow = tmp_path / "slow-g++"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *source.cpp*) echo $$ > {pid_file}.new; '
        f'mv {pid_file}.new {pid_file}; sleep 300;; esac\nexec g++ "$@"\n'
    )
    slow.chmod(0o755)
    stop = threading.Event()

    def stop_when_compiling() -> None:
        while not pid_file.exists():
            time.sleep(0.05)
        stop.set()

    watcher = threading.Thread(target=stop_when_compiling, daemon=True)
    watcher.start()
    with pytest.raises(KernelBuildError, match="the build was stopped"):
        obtain(kernel_source(), dataclasses.replace(settings, cxx=str(slow)), stop=stop)
    watcher.join()
    state = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    assert not state.exists() or ") Z " in state.read_text()


def test_build_that_takes_too_long_is_an_error(settings: Settings) -> None:
    message = failure(kernel_source(), settings, limit=0.2)
    assert "the build took more than 0 s and was ended" in message


def test_full_disk_is_an_error_that_names_the_cache(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_module, "run_worker", refuse)
    with pytest.raises(CacheError, match=r"No space left on device; .*RWKV_JIT_CACHE_DIR"):
        obtain(kernel_source(), settings)


def test_many_sources_give_results_in_their_order(settings: Settings) -> None:
    good, bad = kernel_source(), kernel_source(extra="int x = foo;")
    seen: dict[int, BuildResult] = {}
    results = build_many([bad, good], settings, jobs=2, on_result=seen.__setitem__)
    assert isinstance(results[0], KernelBuildError)
    assert isinstance(results[1], CacheEntry)
    assert seen == dict(enumerate(results))
    assert build_many([], settings) == []


def test_environment_does_not_change_a_build(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DFROM_THE_ENVIRONMENT")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "1.0")
    slug = CPU_SLUG if shutil.which("nvcc") is None else CUDA_SLUG
    source = kernel_source(slug, extra="#ifdef FROM_THE_ENVIRONMENT\n#error\n#endif")
    assert obtain(source, settings).library.is_file()


@needs_nvcc
def test_cuda_kernel_builds_without_a_gpu_and_reports_its_resources(settings: Settings) -> None:
    entry = obtain(kernel_source(CUDA_SLUG), settings)
    assert entry.source.name == "source.cu"
    [(name, resources)] = entry.manifest.resources.items()
    assert "reverse" in name
    assert resources["registers"] > 0
    assert resources["shared"] == 256
    needed = needed_libraries(entry.library)
    assert any(library.startswith("libcudart.so.") for library in needed)
    assert not any("torch" in library or "c10" in library for library in needed)


@needs_nvcc
def test_cuda_error_is_told_as_nvcc_tells_it(settings: Settings) -> None:
    message = failure(kernel_source(CUDA_SLUG, extra="int x = foo;"), settings)
    assert message.startswith(f"{CUDA_SLUG}.forward: nvcc failed (exit 2): source.cu(")
    assert 'error: identifier "foo" is undefined. Full log: ' in message


@needs_nvcc
def test_architecture_that_nvcc_does_not_know_gives_a_hint(settings: Settings) -> None:
    message = failure(kernel_source("wkv7_n64_bf16_l16_sm199"), settings)
    assert "install a newer toolkit or choose another arch" in message


def test_build_leaves_nothing_in_the_cache_but_entry_and_lock(
    built: tuple[Settings, CacheEntry],
) -> None:
    base = Cache.open(built[0]).root / "v1"
    assert [path.suffix for path in (base / "locks").iterdir()] == [".lock"]
    for name in ("staging", "quarantine", "failed"):
        assert list((base / name).iterdir()) == []
