"""What is measured, and that nothing wrong is timed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rwkv_jit.bench import measure
from rwkv_jit.bench.cases import Case, Shape
from rwkv_jit.bench.contenders import Absentee, Contender, line_up, loop, ours, peers
from rwkv_jit.bench.inputs import Tensors
from rwkv_jit.bench.measure import Pass, Result, measure_case, result_data
from rwkv_jit.bench.timing import Timing
from rwkv_jit.config import OpConfig

BANDWIDTH = 1e9


def measured(case: Case, *who: Contender | Absentee) -> list[Result]:
    return measure_case(case, who, "cpu", bandwidth=BANDWIDTH, seconds=0.0)


def test_ours_is_measured_and_compared_with_the_loop(case: Case) -> None:
    who = line_up(case, "cpu", known_peers=False, peer_files=())
    ours, loop_result = measured(case, *who)
    assert (ours.status, loop_result.status) == ("ok", "ok")
    assert ours.error is not None
    assert ours.limit is not None
    assert 0 < ours.error <= ours.limit
    for name, tensors in (("forward", 7), ("both", 20)):
        taken = ours.passes[name]
        assert taken.timing.runs >= 5
        assert taken.floor_ms == pytest.approx(tensors * 20 * 2 * 8 * 4 / BANDWIDTH * 1e3)
        assert taken.loop_ms == loop_result.passes[name].timing.median_ms
        assert loop_result.passes[name].times_loop == 1.0
    data = json.loads(json.dumps(result_data(ours)))
    assert data["shape"] == [1, 20, 2, 8]
    assert data["kernels"] == {"forward": "wkv7_forward.cpp", "backward": "wkv7_backward.cpp"}
    assert data["passes"]["both"]["median_ms"] == ours.passes["both"].timing.median_ms


@pytest.mark.parametrize("name", ["token_shift_mix", "kk_pre"])
def test_a_step_around_the_recurrence_is_measured_in_all_its_results(name: str) -> None:
    case = Case(op=name, shape=Shape(1, 20, 2, 8), dtype="fp32")
    (result,) = measured(case, ours(case, "cpu"))
    assert result.status == "ok"
    assert set(result.passes) == {"forward", "both"}
    assert result.kernels == {e: f"{name}_{e}.h" for e in ("forward", "backward")}


def test_ratios_are_to_the_floor_and_to_the_loop() -> None:
    timing = Timing(median_ms=4.0, lower_ms=3.0, upper_ms=5.0, runs=5)
    taken = Pass(timing=timing, floor_ms=1.0, loop_ms=20.0)
    assert (taken.times_floor, taken.share_of_copy, taken.times_loop) == (4.0, 0.25, 5.0)
    assert Pass(timing=timing, floor_ms=1.0).times_loop is None


def test_what_fails_the_gate_is_not_timed(
    case: Case, config: OpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tensors: Tensors) -> list[torch.Tensor]:
        return [1.01 * y for y in loop(config).call(tensors)]

    monkeypatch.setattr(measure, "time_of", lambda *_: pytest.fail("timed"))
    (result,) = measured(case, Contender(name="x", call=wrong, config=config, limit=2e-5))
    assert (result.status, result.passes) == ("failed", {})
    assert result.error == pytest.approx(1e-2, rel=1e-2)
    assert "is above 2.0e-05; not timed" in result.why


def test_an_infinite_error_leaves_the_json_valid(case: Case, config: OpConfig) -> None:
    def undefined(tensors: Tensors) -> list[torch.Tensor]:
        return [torch.nan * y for y in loop(config).call(tensors)]

    (result,) = measured(case, Contender(name="x", call=undefined, config=config, limit=1.0))
    assert (result.status, result.error) == ("failed", math.inf)
    assert json.loads(json.dumps(result_data(result), allow_nan=False))["error"] is None
    assert result.why.startswith("error inf of ")


def test_one_that_raises_does_not_stop_the_others(case: Case, config: OpConfig) -> None:
    def broken(_tensors: Tensors) -> list[torch.Tensor]:
        raise RuntimeError("no kernel image\nand more")

    first, second, third = measured(
        case,
        Absentee(name="gone", status="missing", why="No module named 'gone'"),
        Contender(name="broken", call=broken, config=config, limit=1.0),
        loop(config),
    )
    assert (first.status, first.why) == ("missing", "No module named 'gone'")
    assert (second.status, second.why) == ("failed", "RuntimeError: no kernel image")
    assert third.status == "ok"


def test_the_loop_passes_in_every_dtype(case: Case, config: OpConfig) -> None:
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        theirs = OpConfig(
            op="wkv7",
            head_size=8,
            dtype=dtype,
            chunk_length=16,
            arch=config.arch,
            state_dtype="fp64" if dtype == "fp64" else "fp32",
        )
        (result,) = measured(case, loop(theirs))
        assert result.status == "ok", result.why


def test_rwkv7_hf_passes_the_gate_on_its_own(case: Case, config: OpConfig) -> None:
    pytest.importorskip("rwkv7_hf")
    peer = next(peer for peer in peers(config) if peer.name == "rwkv7-hf")
    (result,) = measured(case, peer)
    assert result.status == "ok", result.why
    assert set(result.passes) == {"forward", "both"}
