"""One build: what it leaves in the cache, and what is said when it fails."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from kernel_sources import CPU_SLUG, CUDA_SLUG, kernel_source
from rwkv_jit.build import obtain
from rwkv_jit.cache import Cache, CacheEntry
from rwkv_jit.errors import KernelBuildError
from rwkv_jit.render import RenderedSource
from rwkv_jit.settings import Settings
from stuck_compiler import StuckCompiler

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("c++") is None, reason="needs an x86-64 compiler"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


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


def test_build_leaves_nothing_in_the_cache_but_the_entry(
    built: tuple[Settings, CacheEntry],
) -> None:
    base = Cache.open(built[0]).root / "v1"
    assert len(list((base / "entries").glob("*/*"))) == 1
    for name in ("staging", "quarantine", "failed"):
        assert list((base / name).iterdir()) == []


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
    compiler = StuckCompiler(tmp_path)
    stop = threading.Event()

    def stop_when_compiling() -> None:
        while not compiler.is_compiling():
            time.sleep(0.05)
        stop.set()

    watcher = threading.Thread(target=stop_when_compiling, daemon=True)
    watcher.start()
    with pytest.raises(KernelBuildError, match="the build was stopped"):
        obtain(kernel_source(), dataclasses.replace(settings, cxx=str(compiler.program)), stop=stop)
    watcher.join()
    assert compiler.is_gone()


def test_build_that_takes_too_long_is_an_error(settings: Settings) -> None:
    message = failure(kernel_source(), settings, limit=0.2)
    assert "the build took more than 0 s and was ended" in message


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
