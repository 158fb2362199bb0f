"""The figure: two panels, a line for each contender and pass, the floor, in a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rwkv_jit.bench.cases import Case, Shape, sweep
from rwkv_jit.bench.measure import Pass, Result
from rwkv_jit.bench.plot import check_plotting, write_plot
from rwkv_jit.bench.timing import Timing
from rwkv_jit.errors import BenchError

CORNER = Shape(1, 64, 4, 8)


def results(by: str, dtype: str = "fp32") -> list[Result]:
    taken = Pass(timing=Timing(median_ms=2.0, lower_ms=1.0, upper_ms=3.0, runs=5), floor_ms=0.5)
    return [
        Result(
            case=Case(op="wkv7", shape=shape, dtype=dtype),
            by=by,
            status="ok",
            passes={"forward": taken, "both": taken},
        )
        for shape in sweep(CORNER)
    ]


def test_a_figure_has_a_line_for_each_contender_and_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "times.svg"
    gone = Result(case=results("x")[0].case, by="gone", status="missing", why="not here")
    write_plot([*results("rwkv_jit"), *results("loop"), gone], CORNER, "A machine", path)
    text = path.read_text(encoding="utf-8")
    for said in ("A machine", "wkv7 fp32, N = 8, B H = 4", "wkv7 fp32, N = 8, T = 64"):
        assert f"<!-- {said} -->" in text
    for name in ("rwkv_jit", "loop", "floor"):
        assert text.count(f"<!-- {name}, forward -->") == 1
        assert text.count(f"<!-- {name}, forward + backward -->") == 1
    assert "gone" not in text
    # Two panels, each with its frame.
    assert text.count('id="axes_') == 2


def test_what_could_not_be_measured_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "times.png"
    one = Result(case=results("x")[0].case, by="rwkv_jit", status="failed", why="wrong")
    with pytest.raises(BenchError, match="nothing could be measured"):
        write_plot([one], CORNER, "", path)
    assert not path.exists()
    # A length alone: the panel of heads has nothing on it.
    write_plot([one, results("loop")[0]], CORNER, "", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_each_dtype_has_its_own_panels(tmp_path: Path) -> None:
    path = tmp_path / "times.svg"
    write_plot([*results("rwkv_jit"), *results("rwkv_jit", "bf16")], CORNER, "", path)
    assert path.read_text(encoding="utf-8").count('id="axes_') == 4


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be written"):
        write_plot(results("rwkv_jit"), CORNER, "", tmp_path / "missing" / "times.png")


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plotting()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BenchError, match=r"pip install 'rwkv_jit\[bench\]'"):
        check_plotting()
