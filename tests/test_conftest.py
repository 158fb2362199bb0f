"""The suite's own ground: cache, log level and seeds."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import pytest
import torch


def test_cache_is_a_temporary_directory_of_the_session(
    session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    assert os.environ["RWKV_JIT_CACHE_DIR"] == str(session_cache)
    assert session_cache.parent in (base, base.parent)


def test_log_level_is_quiet() -> None:
    assert os.environ["RWKV_JIT_LOG_LEVEL"] == "quiet"


def test_seed_comes_from_the_name_of_the_test(request: pytest.FixtureRequest, seed: int) -> None:
    assert seed == zlib.crc32(request.node.nodeid.encode())
    drawn, drawn_by_torch = random.random(), torch.rand(3)
    assert drawn == random.Random(seed).random()
    assert torch.equal(drawn_by_torch, torch.rand(3, generator=torch.Generator().manual_seed(seed)))
