"""readout: from the recurrence's output to what the output projection of RWKV-7 takes."""

from __future__ import annotations

from .elementwise import Schedule, elementwise, parameter
from .tensors import K, R, V, Y, token

_INPUTS = (
    Y,
    R,
    K,
    V,
    token("g", "gate"),
    parameter("r_k", "weight of a token's own key", shape=("H", "N")),
    parameter("weight", "scale of the group norm"),
    parameter("bias", "added by the group norm"),
)

READOUT = elementwise(
    name="readout",
    summary="RWKV-7's output: group norm per head, the bonus of a token's own key, the gate",
    formula="out = (group_norm(y) * weight + bias + (sum_n r * k * r_k) v) * g",
    inputs=_INPUTS,
    outputs=(token("out", "result"),),
    saved=_INPUTS,
    schedules={"forward": Schedule(1), "backward": Schedule(1, blocks=1)},
    heads=True,
    scalars={"eps": 64e-5},
)
