"""What tests of building share: a cache of their own, one that holds a kernel, and a count."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kernel_sources import kernel_source
from rwkv_jit.build import attempt, obtain
from rwkv_jit.cache import CacheEntry
from rwkv_jit.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # The blank is part of the test: compilers, ninja and the linker must all bear it.
    return Settings(cache_dir=tmp_path / "the cache", log_level="quiet")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, CacheEntry]:
    """A cache in which `kernel_source()` is built."""
    settings = Settings(cache_dir=tmp_path_factory.mktemp("built"), log_level="quiet")
    return settings, obtain(kernel_source(), settings)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One item for each worker that is started from here on."""
    started: list[float] = []
    real = attempt.run_worker

    def counting(*args: object, **kwargs: object) -> int:
        started.append(time.monotonic())
        return real(*args, **kwargs)

    monkeypatch.setattr(attempt, "run_worker", counting)
    return started
