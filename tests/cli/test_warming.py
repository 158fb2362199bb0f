"""Which kernels exist, of those that are wanted."""

from __future__ import annotations

from pathlib import Path

from rwkv_jit.cli.planning import Choices, plan
from rwkv_jit.cli.warming import look_up
from rwkv_jit.settings import Settings


def test_looking_up_creates_nothing(tmp_path: Path) -> None:
    sources = plan(Choices(archs=("sm80", "x86_64_v2"), ops=("wkv7",)))
    for mode in ("auto", "prebuilt"):
        settings = Settings(cache_dir=tmp_path / "cache", mode=mode)
        outcomes = look_up(sources, settings)
        assert {outcome.status for outcome in outcomes} == {"missing"}
    assert not (tmp_path / "cache").exists()
