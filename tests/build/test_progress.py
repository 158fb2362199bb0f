"""The lines that a build shows."""

from __future__ import annotations

import pytest

from rwkv_jit.build.progress import Progress


def test_fast_build_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("wkv7.forward", "info")
    progress.tick(0.5)
    progress.done(0.6)
    assert capsys.readouterr().err == ""


def test_slow_build_shows_start_heartbeats_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("wkv7.forward", "info")
    for tenth in range(250):
        progress.tick(tenth / 10)
    progress.done(25.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "rwkv_jit: building wkv7.forward ...",
        "rwkv_jit: still building wkv7.forward (10 s)",
        "rwkv_jit: still building wkv7.forward (20 s)",
        "rwkv_jit: built wkv7.forward in 25.0 s",
    ]


def test_waiting_names_the_holder(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("wkv7.forward", "info").waiting(5.0, "process 7 on here since noon")
    assert "waiting 5 s for process 7 on here since noon" in capsys.readouterr().err


def test_level_warning_shows_waits_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("wkv7.forward", "warning")
    progress.tick(5.0)
    progress.waiting(5.0, "someone")
    progress.done(6.0)
    said = capsys.readouterr().err
    assert said == "rwkv_jit: waiting 5 s for someone, which builds wkv7.forward\n"


@pytest.mark.parametrize("level", ["quiet", "error"])
def test_levels_above_warning_show_nothing(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("wkv7.forward", level)
    progress.tick(5.0)
    progress.waiting(5.0, "someone")
    progress.done(6.0)
    assert capsys.readouterr().err == ""
