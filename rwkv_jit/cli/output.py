"""Printing for people and programs: tables, JSON, and numbers in words."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

STATUS_STYLES: Mapping[str, str] = {
    "ok": "green",
    "built": "green",
    "hit": "cyan",
    "warning": "yellow",
    "missing": "yellow",
    "error": "bold red",
    "failed": "bold red",
}
_PIPED_WIDTH = 1000


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal; where there is none, lines are as long as they need."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        width=None if stream.isatty() else _PIPED_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
    )


def print_view(view: RenderableType) -> None:
    """Print to standard output; where it is no terminal, without blanks at the ends of lines."""
    console = make_console()
    if sys.stdout.isatty():
        console.print(view)
        return
    with console.capture() as capture:
        console.print(view)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def print_json(data: object) -> None:
    """Print to standard output as JSON."""
    typer.echo(json.dumps(data, indent=2))


def make_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], wrapped: Sequence[str]
) -> Table:
    """Plain columns, two blanks apart. Those of `wrapped` become narrow where there is no room, one
    called "status" is coloured, and numbers ("#" ends their names, not shown) stand right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.removesuffix("#"),
            justify="right" if column.endswith("#") else "left",
            no_wrap=column not in wrapped,
            overflow="fold",
        )
    for row in rows:
        cells = zip(columns, row, strict=True)
        table.add_row(
            *(
                Text(text, STATUS_STYLES.get(text, "") if column == "status" else "")
                for column, text in cells
            )
        )
    return table


def count_of(number: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shorten(values: Sequence[str]) -> str:
    """A list of values; a long one of equally spaced numbers by its ends and its step."""
    if len(values) > 6 and all(value.isdecimal() for value in values):
        numbers = [int(value) for value in values]
        steps = {b - a for a, b in itertools.pairwise(numbers)}
        if len(steps) == 1:
            return f"{numbers[0]} to {numbers[-1]} in steps of {steps.pop()}"
    return ", ".join(values)


def show_number(value: float | None, digits: int = 0) -> str:
    """A number, or "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def show_bytes(count: int) -> str:
    """A size for people: 512 B, 1.4 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def show_age(created: str, now: datetime | None = None) -> str:
    """Time since an ISO 8601 instant for people: 5 min, 3 h, 12 d."""
    try:
        age = (now or datetime.now(timezone.utc)) - datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return "?"
    seconds = max(0, int(age.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
