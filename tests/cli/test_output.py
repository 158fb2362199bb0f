"""Numbers, ages and lists in words; tables without blanks at the ends of lines."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from rwkv_jit.cli.output import make_table, print_view, shorten, show_age, show_bytes


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (2_000_000, "2.0 MB"),
        (3 * 10**12, "3000.0 GB"),
    ],
)
def test_sizes_have_units(count: int, shown: str) -> None:
    assert show_bytes(count) == shown


@pytest.mark.parametrize(
    ("created", "shown"),
    [
        ("2026-03-01T12:00:00+00:00", "0 s"),
        ("2026-03-01T11:59:18+00:00", "42 s"),
        ("2026-03-01T11:30:00+00:00", "30 min"),
        ("2026-03-01T03:00:00+00:00", "9 h"),
        ("2026-02-01T12:00:00+00:00", "28 d"),
        ("2026-03-02T12:00:00+00:00", "0 s"),
        ("yesterday", "?"),
        ("2026-03-01T12:00:00", "?"),
    ],
)
def test_ages_have_units_and_nonsense_has_none(created: str, shown: str) -> None:
    assert show_age(created, datetime(2026, 3, 1, 12, tzinfo=timezone.utc)) == shown


def test_long_lists_of_equally_spaced_numbers_are_shortened() -> None:
    assert shorten([str(number) for number in range(8, 257, 8)]) == "8 to 256 in steps of 8"
    assert shorten(["16", "32", "64"]) == "16, 32, 64"
    assert shorten(["1", "2", "3", "4", "5", "6", "8"]) == "1, 2, 3, 4, 5, 6, 8"


def test_piped_tables_keep_long_cells_whole_and_end_no_line_in_blanks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_view(make_table(("kernel", "count#"), [("x" * 200, "1"), ("[B, T]", "22")], ["kernel"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["kernel", "count"]
    assert lines[2].startswith("[B, T] ")
    assert not any(line.endswith(" ") for line in lines)
