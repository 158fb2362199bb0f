"""What `rwkv-jit bench` shows to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ..bench.measure import Pass, Result
from .output import make_table, show_bytes

_PASSES = {
    "forward": ("forward", "forward"),
    "both": ("forward + backward", "backward"),
    "decode": ("step", "decode"),
    "prefill": ("prefill", "prefill"),
}
_COLUMNS = (
    "by", "status", "pass", "kernel", "error#", "ms#", "quartiles#", "floor ms#", "x floor#",
    "of copy#", "x loop#", "extra#",
)  # fmt: skip


def machine_text(machine: Mapping[str, Any]) -> str:
    """What the times were taken on, in a few lines."""
    names = ("rwkv_jit", "torch", "cuda", "driver", "nvcc", "host_compiler", "python")
    versions = [f"{name} {machine[name]}" for name in names if machine[name]]
    copy = machine["copy_bytes_per_second"] / 1e9
    return (
        f"{machine['device']} ({machine['arch']}), {machine['threads']} threads, "
        f"a copy moves {copy:.4g} GB/s\n{', '.join(versions)}"
    )


def case_view(results: Sequence[Result]) -> Group:
    """The results of one case: a line for each contender and pass, then what went wrong."""
    rows = [row for result in results for row in _rows(result)]
    # A column that says nothing here, such as the loop's on a GPU, is left out.
    told = [at for at in range(len(_COLUMNS)) if any(row[at] not in ("", "-") for row in rows)]
    table = make_table(
        [_COLUMNS[at] for at in told], [[row[at] for at in told] for row in rows], ["kernel"]
    )
    problems = [
        Text(f"{result.by} {result.status}: {result.why}") for result in results if result.why
    ]
    parts: list[RenderableType] = [
        Text(str(results[0].case), "bold"),
        Padding(table, (0, 0, 0, 2)),
        *problems,
        Text(),
    ]
    return Group(*parts)


def _rows(result: Result) -> list[list[str]]:
    error = "-" if result.error is None else f"{result.error:.1e}"
    if not result.passes:
        row = [result.by, result.status, "-", "-", error]
        return [row + ["-"] * (len(_COLUMNS) - len(row))]
    rows: list[list[str]] = []
    for name, taken in result.passes.items():
        shown, entry = _PASSES[name]
        first = not rows
        head = [result.by, result.status] if first else ["", ""]
        extra = "-" if first or result.extra_bytes is None else show_bytes(result.extra_bytes)
        kernel = result.kernels.get(entry, "-")
        rows.append([*head, shown, kernel, error if first else "", *_numbers(taken), extra])
    return rows


def _numbers(taken: Pass) -> list[str]:
    timing = taken.timing
    return [
        f"{timing.median_ms:.3g}",
        f"{timing.lower_ms:.3g} - {timing.upper_ms:.3g}",
        f"{taken.floor_ms:.2g}",
        f"{taken.times_floor:.3g}",
        f"{taken.share_of_copy:.1%}",
        "-" if taken.times_loop is None else f"{taken.times_loop:.3g}",
    ]
