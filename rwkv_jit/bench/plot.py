"""A figure of times against T and against B * H. The only user of matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BenchError
from .cases import Shape, heads_of, lengths_of
from .measure import PASSES, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

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

    results = [result for result in results if result.passes]
    if not results:
        raise BenchError("nothing could be measured, so there is nothing to draw")
    kinds = list(dict.fromkeys((result.case.op, result.case.dtype) for result in results))
    names = list(dict.fromkeys(result.by for result in results))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    figure = Figure(figsize=(13, 4.2 * len(kinds)), layout="constrained")
    lines: dict[str, Line2D] = {}
    for row, (op, dtype) in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        of_kind = [r for r in results if (r.case.op, r.case.dtype) == (op, dtype)]
        by_length, by_heads = row
        lengths = {shape: shape.length for shape in lengths_of(corner)}
        heads = {shape: shape.sequences_and_heads for shape in heads_of(corner)}
        for axes, across in ((by_length, lengths), (by_heads, heads)):
            lines |= _draw_panel(axes, of_kind, across, colors)
        fixed = f"{op} {dtype}, N = {corner.head_size}"
        by_length.set(xlabel="T", title=f"{fixed}, B H = {corner.sequences_and_heads}")
        by_heads.set(xlabel="B H", title=f"{fixed}, T = {corner.length}")
    figure.legend(list(lines.values()), list(lines), loc="outside right upper")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from error


def _draw_panel(
    axes: Axes, results: Sequence[Result], across: Mapping[Shape, int], colors: Mapping[str, str]
) -> dict[str, Line2D]:
    """Lines over the number that belongs to each shape, by their labels."""
    lines: dict[str, Line2D] = {}
    results = [result for result in results if result.case.shape in across]
    if not results:
        # Logarithmic axes must have something on them.
        return lines
    for which in PASSES:
        floor: dict[int, float] = {}
        for name, color in colors.items():
            taken = {
                across[result.case.shape]: result.passes[which]
                for result in results
                if result.by == name
            }
            floor.update((x, one.floor_ms) for x, one in taken.items())
            times = {x: one.timing.median_ms for x, one in taken.items()}
            label = f"{name}, {_LABELS[which]}"
            lines[label] = _draw_line(axes, times, color, _STYLES[which])
        label = f"floor, {_LABELS[which]}"
        lines[label] = _draw_line(axes, floor, "grey", _STYLES[which])
    axes.set(xscale="log", yscale="log", ylabel="ms")
    axes.set_xticks(list(across.values()), [str(x) for x in across.values()])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    return lines


def _draw_line(axes: Axes, points: Mapping[int, float], color: str, style: str) -> Line2D:
    x = sorted(points)
    (line,) = axes.plot(x, [points[at] for at in x], style, marker=".", color=color)
    return line
