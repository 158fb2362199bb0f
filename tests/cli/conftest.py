"""A cache for one test alone, which the program finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_jit.settings import current_settings


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache that only this test uses; settings are read once in a process."""
    root = tmp_path / "cache"
    monkeypatch.setenv("RWKV_JIT_CACHE_DIR", str(root))
    current_settings.cache_clear()
    yield root
    current_settings.cache_clear()
