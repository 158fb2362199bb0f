"""wkv7: the RWKV-7 time-mixing recurrence."""

from __future__ import annotations

from ..spec import EntrySpec, KernelVariant, OpSpec
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


# On tensor cores. Checkpoints stand before each span of four chunks, prepared together by a block.
_SPAN = 64
_CHUNKED_BYTES = {"forward": 102_400, "backward": 114_688}


def _chunked(entry: str) -> KernelVariant:
    return KernelVariant(
        entry=entry,
        template=f"wkv7_chunked_{entry}.cu",
        min_arch=80,
        head_sizes=(64,),
        dtypes=("bf16",),
        chunk_lengths=(16,),
        constants=lambda _config: {
            "checkpoint_tokens": _SPAN,
            "shared_bytes": _CHUNKED_BYTES[entry],
        },
        # One limit for both: the entries share their checkpoints.
        shared_bytes=max(_CHUNKED_BYTES.values()),
        checkpoint_tokens=_SPAN,
    )


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
    variants=(
        *(_chunked(entry) for entry in ("forward", "backward")),
        *recurrence_variants("wkv7", constants={}, backward_scratch=()),
    ),
)
