"""wkv5: the RWKV-5 time-mixing recurrence, which is wkv6 with one decay for all tokens."""

from __future__ import annotations

from dataclasses import replace

from ..spec import OpSpec
from .chunked import Block, Chunked
from .tensors import W
from .wkv6 import PARAMETERS, bonus_entries, bonus_variants

_W = replace(
    W,
    shape=("H", "N"),
    meaning="decay, see decay=; [H] for one of all channels",
    last_axis_optional=True,
)

# As wkv6 has them, but with a table of the decay's powers for the decays of the tokens.
_CHUNKED = (
    Chunked(64, 64, forward=Block(8, 8, 2, 2, 97_376), backward=Block(8, 8, 2, 1, 165_216)),
    Chunked(64, 32, forward=Block(8, 8, 4, 1, 53_568), backward=Block(8, 8, 4, 1, 87_488)),
)

WKV5 = OpSpec(
    name="wkv5",
    summary="RWKV-5 time mixing: a linear recurrence with a decay per channel and a bonus",
    formula="y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d) + v_t k_t^T",
    parameters=PARAMETERS,
    entries=bonus_entries(_W),
    saved_outputs=("checkpoints",),
    decays=("loglog", "log", "factor"),
    variants=bonus_variants(_CHUNKED, decay_per_token=False),
)
