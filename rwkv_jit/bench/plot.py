"""A figure of times against T and against B * H. The only user of matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BenchError
from .cases import Shape, heads_of, lengths_of
from .measure import PASSES, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {"forward": "--", "both": "-"}
_LABELS = {"forward": "forward", "both": "forward + backward"}


def check_plotting() -> None:
    """Raise BenchError unless there is something to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("plots need matplotlib: pip install 'rwkv_jit[bench]'")


def write_plot(results: Sequence[Result], corner: Shape, title: str, path: Path) -> None:
    """Draw results of the shapes that `lengths_of` and `heads_of` make of `corner`; a row of two
    panels for each operator and dtype. The suffix of `path` says in which format."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    kinds = list(dict.fromkeys((result.case.op, result.case.dtype) for result in results))
    figure = Figure(figsize=(11, 4.2 * len(kinds)), layout="constrained")
    for row, (op, dtype) in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        of_kind = [r for r in results if (r.case.op, r.case.dtype) == (op, dtype)]
        by_length, by_heads = row
        _draw_panel(by_length, of_kind, [(s, s.length) for s in lengths_of(corner)])
        _draw_panel(by_heads, of_kind, [(s, s.sequences_and_heads) for s in heads_of(corner)])
        fixed = f"{op} {dtype}, N = {corner.head_size}"
        by_length.set(xlabel="T", title=f"{fixed}, B H = {corner.sequences_and_heads}")
        by_heads.set(xlabel="B H", title=f"{fixed}, T = {corner.length}")
        by_length.legend(fontsize="small")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from error


def _draw_panel(axes: Axes, results: Sequence[Result], shapes: Sequence[tuple[Shape, int]]) -> None:
    """Lines of the shapes over the number that stands beside each."""
    across = dict(shapes)
    names = list(dict.fromkeys(result.by for result in results if result.passes))
    for which in PASSES:
        floor: dict[int, float] = {}
        for number, name in enumerate(names):
            taken = {
                across[result.case.shape]: result.passes[which]
                for result in results
                if result.by == name and result.passes and result.case.shape in across
            }
            floor.update((x, one.floor_ms) for x, one in taken.items())
            times = {x: one.timing.median_ms for x, one in taken.items()}
            _draw_line(axes, times, f"{name}, {_LABELS[which]}", f"C{number}", _STYLES[which])
        _draw_line(axes, floor, f"floor, {_LABELS[which]}", "grey", _STYLES[which])
    axes.set(xscale="log", yscale="log", ylabel="ms")
    axes.grid(alpha=0.3, which="both")


def _draw_line(axes: Axes, points: dict[int, float], label: str, color: str, style: str) -> None:
    x = sorted(points)
    axes.plot(x, [points[at] for at in x], style, marker=".", color=color, label=label)
