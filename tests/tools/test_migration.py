"""The comparison of clients by their own kernels and by ours: nothing wrong is timed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import migration


@pytest.mark.parametrize(
    ("own", "ours", "row"),
    [
        (0.01, 0.012, "training step | 3.00 | 1.50 | 2.00 | 0.0e+00, 1.0e-02 | 0.0e+00, 1.2e-02 |"),
        (0.01, 0.02, "not timed | | | | 0.0e+00, 1.0e-02 | 0.0e+00, 2.0e-02 |"),
        (0.01, float("nan"), "not timed | | | | 0.0e+00, 1.0e-02 | 0.0e+00, nan |"),
        (float("inf"), 0.01, "not timed | | | | 0.0e+00, inf | 0.0e+00, 1.0e-02 |"),
    ],
)
def test_times_are_printed_only_where_ours_are_as_near_to_float32(
    own: float,
    ours: float,
    row: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def results(client: str, way: str, _arguments: Any) -> dict[str, Any]:
        assert client == "x070"
        off = {"truth": 0, "own": own, "ours": ours}[way]
        gate = {"logits": torch.ones(3), "dw": torch.full((4,), 1 + off), "du": torch.ones(1)}
        gate["du"] += off
        return {"gate": gate, "times": {"training step": 1.5 if way == "ours" else 3.0}}

    monkeypatch.setattr(migration, "results", results)
    monkeypatch.setattr("sys.argv", ["migration.py", "--client", "x070", "--device", "cpu"])
    migration.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"| x070 | {row}"


def test_gradients_are_compared_as_one_vector() -> None:
    truth = {"logits": torch.ones(2), "large": torch.full((3,), 10.0), "small": torch.tensor([0.1])}
    found = {**truth, "small": torch.tensor([0.2])}
    logits, gradients = migration.errors_of(found, truth)
    assert logits == 0
    assert gradients == pytest.approx(0.1 / (300 + 0.01) ** 0.5)


@pytest.mark.skipif(importlib.util.find_spec("rwkv_trainer") is None, reason="needs rwkv-trainer")
def test_rwkv_trainer_is_compared_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shape", "1,16,1", "--layers", "2", "--vocabulary", "64", "--seconds", "0.01"]
    flags = ["--client", "x070", "--device", "cpu", *sizes]
    monkeypatch.setattr("sys.argv", ["migration.py", *flags])
    migration.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[1] for row in rows] == [
        "operator, forward",
        "operator, forward and backward",
        "training step",
    ]
