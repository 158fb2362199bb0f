"""readout: from the recurrence's output to what the output projection of RWKV-7 takes.
gate_output_correction: the same where the group norm is done."""

from __future__ import annotations

from .elementwise import Schedule, elementwise, parameter
from .tensors import K, R, V, Y, token

_UNNORMED = (
    Y,
    R,
    K,
    V,
    token("g", "gate"),
    parameter("r_k", "weight of a token's own key", shape=("H", "N")),
)
_INPUTS = (
    *_UNNORMED,
    parameter("weight", "scale of the group norm"),
    parameter("bias", "added by the group norm"),
)
_OUT = token("out", "result")

READOUT = elementwise(
    name="readout",
    summary="RWKV-7's output: group norm per head, the bonus of a token's own key, the gate",
    formula="out = (group_norm(y) * weight + bias + (sum_n r * k * r_k) v) * g",
    inputs=_INPUTS,
    outputs=(_OUT,),
    saved=_INPUTS,
    schedules={"forward": Schedule(1), "backward": Schedule(1, blocks=1)},
    heads=True,
    scalars={"eps": 64e-5},
)
GATE_OUTPUT_CORRECTION = elementwise(
    name="gate_output_correction",
    summary="RWKV-7's output after its group norm: the bonus of a token's own key, the gate",
    formula="out = (y + (sum_n r * k * r_k) v) * g",
    inputs=_UNNORMED,
    outputs=(_OUT,),
    saved=_UNNORMED,
    schedules={"forward": Schedule(1), "backward": Schedule(1)},
    heads=True,
)
