"""The serving demo from its command line, in its short form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import serve_demo

FLAGS = ("--requests", "6", "--slots", "3", "--layers", "2", "--width", "64", "--device", "cpu")


def test_requests_served_together_have_the_bits_of_those_served_alone(session_cache: Path) -> None:
    program = Path(serve_demo.__file__)
    result = subprocess.run(
        [sys.executable, program, *FLAGS], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "6 of 6 requests have the same answers, logits and states" in result.stdout


def test_what_differs_in_one_bit_is_not_the_same() -> None:
    one = serve_demo.Request([1, 2], 1, 0, answer=[3])
    one.logits = [serve_demo.torch.zeros(4)]
    other = one.fresh()
    other.answer, other.logits = [3], [one.logits[0].clone()]
    assert serve_demo.same(one, other)
    other.logits[0][2] = 1e-30
    assert not serve_demo.same(one, other)
