"""wkv7: the RWKV-7 time-mixing recurrence."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import MOST_SHARED, OpConfig
from ..spec import KNOBS, EntrySpec, OpSpec, TensorSpec
from .chunked import Block, Chunked
from .recurrence import recurrence_variants
from .tensors import (
    CHECKPOINTS,
    CU_SEQLENS,
    DFINAL_STATE,
    DINITIAL_STATE,
    DY,
    FINAL_STATE,
    INITIAL_STATE,
    K,
    R,
    V,
    W,
    Y,
    gradient,
    token,
)

_A = token("a", "first vector of the rank-1 update; -kk in the model")
_B = token("b", "second vector of the rank-1 update; kk * a_gate in the model")
_TOKENS = (R, W, K, V, _A, _B)
_PRODUCTS = TensorSpec(
    name="products",
    shape=("S", "H", "L", "N"),
    dtype=("accumulator",),
    meaning="state times a, of the tokens of a chunk",
)


# Of the chunked backward, whose blocks take turns at a sequence.
_HANDED_OVER = TensorSpec(
    name="handed_over",
    shape=("D", "N", "N"),
    dtype=("accumulator",),
    meaning="gradient of a head's state, between two turns",
)
_TURNS = TensorSpec(
    name="turns",
    shape=("E",),
    dtype=("int32",),
    meaning="which turns there are, how many are taken, and how many of each head are done",
)

# On tensor cores, by what shared memory allows; the first that fits is used.
_CHUNKED = (
    # 10.0, whose compiler needs more registers than three blocks leave.
    Chunked(64, 32, Block(16, 4, 2, 1, 207_360), Block(4, 4, 2, 2, 73_776), min_arch=100),
    Chunked(64, 32, forward=Block(16, 4, 2, 1, 207_360), backward=Block(4, 4, 2, 3, 73_776)),
    Chunked(64, 32, forward=Block(10, 4, 1, 1, 158_304), backward=Block(4, 4, 2, 2, 73_776)),
    Chunked(64, 32, forward=Block(7, 4, 1, 1, 79_152), backward=Block(4, 4, 2, 1, 73_776)),
    # With setmaxnreg, which 9.0a has and no target that runs on later ones.
    Chunked(128, 32, Block(16, 8, 4, 1, 126_976), Block(12, 8, 4, 1, 228_352), only_arch="sm90a"),
    Chunked(128, 32, forward=Block(16, 8, 4, 1, 126_976), backward=Block(8, 8, 4, 1, 168_496)),
    # 8.0, which has no place for two chunks.
    Chunked(128, 16, forward=Block(16, 8, 4, 1, 126_976), backward=Block(8, 8, 8, 1, 117_040)),
)
# The same for float32, whose tensors take twice the memory.
_CHUNKED_TF32 = (
    Chunked(64, 16, forward=Block(16, 4, 4, 1, 205_056), backward=Block(4, 4, 4, 2, 89_392)),
    Chunked(64, 16, forward=Block(12, 4, 4, 1, 136_704), backward=Block(4, 4, 4, 1, 89_392)),
)


def _chunked_constants(config: OpConfig) -> Mapping[str, int]:
    return {"bounded": int(config.decays_are_bounded)}


WKV7 = OpSpec(
    name="wkv7",
    summary="RWKV-7 time mixing: a linear recurrence with a decay and a rank-1 update per token",
    formula="S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t",
    parameters=(
        "r",
        "w",
        "k",
        "v",
        "a",
        "b",
        "initial_state",
        "output_final_state",
        "cu_seqlens",
    ),
    entries={
        "forward": EntrySpec(
            inputs=(*_TOKENS, CU_SEQLENS, INITIAL_STATE),
            outputs=(Y, FINAL_STATE, CHECKPOINTS),
        ),
        "backward": EntrySpec(
            inputs=(*_TOKENS, CU_SEQLENS, CHECKPOINTS, DY, DFINAL_STATE),
            outputs=(*map(gradient, _TOKENS), DINITIAL_STATE),
        ),
    },
    saved_outputs=("checkpoints",),
    decays=("loglog", "logit", "log"),
    knobs=KNOBS,
    variants=(
        *(
            variant
            for dtype, rows in (("bf16", _CHUNKED), ("fp16", _CHUNKED), ("fp32", _CHUNKED_TF32))
            for row in rows
            for variant in row.variants(
                "wkv7",
                _chunked_constants,
                (_HANDED_OVER, _TURNS),
                {"most_shared": MOST_SHARED},
                dtype=dtype,
                uses_bound=True,
                rounds_checkpoints=True,
            )
        ),
        *recurrence_variants("wkv7", constants={}, cuda_scratch=(_PRODUCTS,)),
    ),
)
