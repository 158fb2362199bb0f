"""A bundle of kernels that work, for this machine's CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bundles import source_of
from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.build import obtain
from rwkv_jit.bundle import Bundle
from rwkv_jit.bundle.make import write_bundle
from rwkv_jit.settings import Settings


@pytest.fixture(scope="session")
def cpu_slug() -> str:
    """Of the kernels in `cpu_bundle`."""
    return f"wkv7_n8_fp32_l16_{host_cpu_arch()}"


@pytest.fixture(scope="session")
def cpu_bundle(
    tmp_path_factory: pytest.TempPathFactory, session_cache: Path, cpu_slug: str
) -> Bundle:
    """Forward and backward of head size 8 in float32, built here."""
    settings = Settings(cache_dir=session_cache, log_level="quiet")
    entries = [
        obtain(source_of(f"{cpu_slug}.{entry}"), settings) for entry in ("forward", "backward")
    ]
    return write_bundle(entries, tmp_path_factory.mktemp("bundles") / "cpu")
