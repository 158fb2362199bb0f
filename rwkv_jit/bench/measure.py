"""Measuring a case: the gate first, then times, memory, and what they are to be compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import OpConfig
from ..ops import get_spec
from ..reference import REFERENCES
from .cases import Case, Shape
from .contenders import LOOP, Absentee, Contender, first_line, is_serving, reference
from .gate import relative_errors, slice_of, worst_of
from .inputs import Tensors, draw, draw_gradient, fewest_bytes, pack
from .timing import Timing, extra_memory, time_of, time_of_step

PASSES = ("forward", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The forward without gradients, forward and backward together ("both"), or a call of a serving
    operator ("decode" or "prefill").

    floor_ms: the time in which a copy moves the fewest bytes of the pass.
    loop_ms: what the loop took in the same run; None where it was not run.
    """

    timing: Timing
    floor_ms: float
    loop_ms: float | None = None

    @property
    def times_floor(self) -> float:
        """How many times the floor it took."""
        return self.timing.median_ms / self.floor_ms

    @property
    def share_of_copy(self) -> float:
        """Effective bandwidth, the fewest bytes over the time, as a share of the copy's."""
        return self.floor_ms / self.timing.median_ms

    @property
    def times_loop(self) -> float | None:
        """How many times faster than the loop."""
        return None if self.loop_ms is None else self.loop_ms / self.timing.median_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was found out about one contender in one case.

    status: "ok", "failed" (at the gate or with an error) or "missing". why: where it is not "ok".
    error: largest relative RMS error at the gate, that of `worst`; at most `limit` is right.
    kernels: for each entry the template that served it, of ours.
    extra_bytes: memory of the GPU that forward and backward took beyond the inputs.
    """

    case: Case
    by: str
    status: str
    why: str = ""
    error: float | None = None
    worst: str = ""
    limit: float | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    passes: Mapping[str, Pass] = field(default_factory=dict)
    extra_bytes: int | None = None


def measure_case(
    case: Case,
    contenders: Iterable[Contender | Absentee],
    device: str,
    *,
    bandwidth: float,
    seconds: float,
) -> list[Result]:
    """A result for each contender, in order; the times of one called "loop" stand in all of them.

    bandwidth: bytes a second of a copy on the device. seconds: for each measurement.
    """
    results = []
    for contender in contenders:
        if isinstance(contender, Absentee):
            absent = Result(
                case=case, by=contender.name, status=contender.status, why=contender.why
            )
            results.append(absent)
        else:
            results.append(_measure(case, contender, device, bandwidth, seconds))
    by_name = {result.by: result for result in results}
    if LOOP not in by_name or by_name[LOOP].status != "ok":
        return results
    loop = by_name[LOOP].passes
    return [
        replace(
            result,
            passes={
                name: replace(taken, loop_ms=loop[name].timing.median_ms)
                for name, taken in result.passes.items()
            },
        )
        for result in results
    ]


def result_data(result: Result) -> dict[str, Any]:
    """A result as plain data."""
    case, shape = result.case, result.case.shape
    # JSON has no infinity.
    finite = result.error is not None and math.isfinite(result.error)
    return {
        "op": case.op,
        "shape": [shape.batch, shape.length, shape.heads, shape.head_size],
        "dtype": case.dtype,
        "precision": case.precision,
        "bounded": case.bounded,
        "packed": case.packed,
        "state_dtype": case.state_dtype,
        "by": result.by,
        "status": result.status,
        "why": result.why,
        "error": result.error if finite else None,
        "worst": result.worst,
        "limit": result.limit,
        "kernels": dict(result.kernels),
        "extra_bytes": result.extra_bytes,
        "passes": {
            name: {
                "median_ms": taken.timing.median_ms,
                "lower_quartile_ms": taken.timing.lower_ms,
                "upper_quartile_ms": taken.timing.upper_ms,
                "runs": taken.timing.runs,
                "floor_ms": taken.floor_ms,
                "times_floor": taken.times_floor,
                "share_of_copy": taken.share_of_copy,
                "loop_ms": taken.loop_ms,
                "times_loop": taken.times_loop,
            }
            for name, taken in result.passes.items()
        },
    }


def _measure(
    case: Case, contender: Contender, device: str, bandwidth: float, seconds: float
) -> Result:
    found = Result(
        case=case,
        by=contender.name,
        status="failed",
        limit=contender.limit,
        kernels=contender.kernels,
    )
    try:
        errors = _errors(case, contender, device)
        worst = worst_of(errors)
        found = replace(found, error=errors[worst], worst=worst)
        if not errors[worst] <= contender.limit:
            why = f"error {errors[worst]:.1e} of {worst} is above {contender.limit:.1e}; not timed"
            return replace(found, why=why)
        passes, extra = _time(case, contender, device, bandwidth, seconds)
    except Exception as error:  # noqa: BLE001 - one that fails is no reason to lose the others
        return replace(found, why=first_line(error))
    return replace(found, status="ok", passes=passes, extra_bytes=extra)


def _errors(case: Case, contender: Contender, device: str) -> dict[str, float]:
    config = contender.config
    is_step = not (get_spec(case.op).is_recurrence or is_serving(case.op))
    tensors = _draw(case, config, slice_of(case.shape, all_channels=is_step), device)
    if is_serving(case.op):
        return _errors_of_step(case, contender, tensors)
    truth = reference(config, torch.float64)
    return relative_errors(contender.call, truth, tensors, _compared_names(case, tensors))


def _compared_names(case: Case, tensors: Tensors) -> list[str]:
    """Of what contenders return, in order."""
    spec = get_spec(case.op)
    returned = [x for x in spec.called.outputs if x.name not in spec.saved_outputs]
    there = [x.name for x in returned if not x.optional and x.only_with in ("", *tensors)]
    return there[: 1 if spec.is_recurrence else None]


def _draw(case: Case, config: OpConfig, shape: Shape, device: str) -> Tensors:
    tensors = draw(get_spec(case.op), config, shape, device)
    return pack(tensors, shape) if case.packed else tensors


def _errors_of_step(case: Case, contender: Contender, tensors: Tensors) -> dict[str, float]:
    """Of y and of the states afterwards."""
    serve, names = REFERENCES[case.op], get_spec(case.op).parameters

    def ours(x: Tensors) -> Sequence[torch.Tensor]:
        return *contender.call(x), x["state"]

    def truth(x: Tensors) -> Sequence[torch.Tensor | None]:
        results = serve(*(x.get(name) for name in names), decay=contender.config.decay)
        return results[0], results[-1]

    return relative_errors(ours, truth, tensors, ("y", "state"), gradients=False)


def _time(
    case: Case, contender: Contender, device: str, bandwidth: float, seconds: float
) -> tuple[dict[str, Pass], int | None]:
    """Each pass, and the extra memory of the second."""
    spec, config = get_spec(case.op), contender.config
    tensors = _draw(case, config, case.shape, device)
    if is_serving(case.op):
        name = next(iter(spec.entries))
        measured = time_of_step if name == "decode" else time_of
        timing = measured(lambda: contender.call(tensors), device, seconds)
        least = fewest_bytes(spec, config, tensors, backward=False)
        return {name: Pass(timing=timing, floor_ms=least / bandwidth * 1e3)}, None
    given_in = {name: x.detach().clone() for name, x in tensors.items()}
    leaves = [x.requires_grad_() for x in given_in.values() if x.is_floating_point()]
    with torch.no_grad():
        given = [draw_gradient(x) for x in contender.call(tensors)]

    def forward() -> None:
        with torch.no_grad():
            contender.call(tensors)

    def both() -> None:
        torch.autograd.grad(contender.call(given_in), leaves, given)

    passes = {}
    for name, work in zip(PASSES, (forward, both), strict=True):
        least = fewest_bytes(spec, config, tensors, backward=name == "both")
        timing = time_of(work, device, seconds)
        passes[name] = Pass(timing=timing, floor_ms=least / bandwidth * 1e3)
    return passes, extra_memory(both, device)
