"""token_shift_mix: a token mixed with the one before it, for each use of it. addcmul_mix: the same
with their difference given."""

from __future__ import annotations

from dataclasses import replace

from .elementwise import Schedule, channels, elementwise, parameter
from .tensors import CU_SEQLENS, FINAL_STATE, INITIAL_STATE

_USES = {
    "r": "receptance",
    "w": "decay",
    "k": "key",
    "v": "value",
    "a": "in-context learning rate",
    "g": "gate",
}
_X = channels("x", "tokens")
_DELTA = channels("delta", "what is mixed in, the token before less the token")
_MIXES = tuple(
    parameter(f"x_{use}", f"share of the token before, for the {meaning}", optional=True)
    for use, meaning in _USES.items()
)
_INITIAL_STATE = replace(
    INITIAL_STATE, shape=("S", "C"), dtype=("op",), meaning="token before the first; zeros if None"
)
_FINAL_STATE = replace(FINAL_STATE, shape=("S", "C"), dtype=("op",), meaning="last token")
_INPUTS = (_X, *_MIXES, CU_SEQLENS, _INITIAL_STATE)
_MIXED = tuple(replace(channels(use, f"made with x_{use}"), only_with=f"x_{use}") for use in _USES)

TOKEN_SHIFT_MIX = elementwise(
    name="token_shift_mix",
    summary="RWKV's token shift: tokens mixed with the ones before, for up to six uses at once",
    formula="y_t = x_t + (x_{t-1} - x_t) * x_j,   for each x_j that is given",
    inputs=_INPUTS,
    outputs=(*_MIXED, _FINAL_STATE),
    saved=_INPUTS,
    schedules={"forward": Schedule(4), "backward": Schedule(2, 8)},
    parameters=(
        "x",
        *(tensor.name for tensor in _MIXES),
        "initial_state",
        "output_final_state",
        "cu_seqlens",
    ),
)
ADDCMUL_MIX = elementwise(
    name="addcmul_mix",
    summary="RWKV's token shift with a given difference, for up to six uses at once",
    formula="y = x + delta * x_j,   for each x_j that is given",
    inputs=(_X, _DELTA, *_MIXES),
    outputs=_MIXED,
    saved=(_DELTA, *_MIXES),
    schedules={"forward": Schedule(2), "backward": Schedule(2, 8)},
)
