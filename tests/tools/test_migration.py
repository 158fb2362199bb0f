"""The comparison of clients by their own kernels and by ours: nothing unequal is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import migration


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (0.01, "| x070 | training step | 3.00 | 1.50 | 2.00 | logits 0.0e+00, dw 1.0e-02 |"),
        (0.2, "| x070 | not timed | | | | logits 0.0e+00, dw 2.0e-01 |"),
        (float("nan"), "| x070 | not timed | | | | logits 0.0e+00, dw inf |"),
    ],
)
def test_times_are_printed_only_where_results_are_equal(
    error: float,
    row: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def results(client: str, way: str, _arguments: Any) -> dict[str, Any]:
        assert client == "x070"
        off = error if way == "ours" else 0.0
        gate = {"logits": torch.ones(3), "dw": torch.full((4,), 1 + off)}
        return {"gate": gate, "times": {"training step": 1.5 if way == "ours" else 3.0}}

    monkeypatch.setattr(migration, "results", results)
    monkeypatch.setattr("sys.argv", ["migration.py", "--client", "x070", "--device", "cpu"])
    migration.main()
    assert capsys.readouterr().out.splitlines()[-1] == row
