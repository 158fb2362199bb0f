"""Libraries hold no path of the machine that built them, so two builds of one key are alike."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from crew import Note
from kernel_sources import CPU_SLUG, CUDA_SLUG, kernel_source
from rwkv_jit.build import obtain
from rwkv_jit.settings import Settings

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("c++") is None, reason="needs an x86-64 compiler"
)
PLACE = "EXPORT const char* place() { return __FILE__; }"


def build_twice(slug: str, tmp_path: Path) -> list[bytes]:
    """The library's bytes from two caches at different places."""
    libraries = []
    for name in ("one", "another place"):
        settings = Settings(cache_dir=tmp_path / name, log_level="quiet")
        entry = obtain(kernel_source(slug, extra=PLACE), settings)
        libraries.append(entry.library.read_bytes())
    return libraries


def test_two_builds_for_a_cpu_are_identical(tmp_path: Path, note: Note) -> None:
    first, second = build_twice(CPU_SLUG, tmp_path)
    assert first == second
    assert str(tmp_path).encode() not in first
    note("one key built at two places, CPU (byte-identical; real builds)", 2)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_builds_for_cuda_hold_no_path(tmp_path: Path, note: Note) -> None:
    libraries = build_twice(CUDA_SLUG, tmp_path)
    for library in libraries:
        # Line information names the source, which lies nowhere in particular.
        assert b"/proc/self/cwd/source.cu" in library
        for word in (tmp_path.name, "staging", "tmpxft"):
            assert word.encode() not in library
    note("one key built at two places, CUDA (no path inside; real builds)", 2)
