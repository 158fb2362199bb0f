"""wkv7: the RWKV-7 time-mixing recurrence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import CHECKPOINT_DTYPES
from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec
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


# On tensor cores: how much a block works on at once, by what shared memory allows; the first that
# fits is used. Checkpoints stand before each span, whose chunks a block's warps prepare side by
# side; `blocks` share a multiprocessor.
@dataclass(frozen=True, slots=True)
class _Chunked:
    head_size: int
    span: int
    forward: Mapping[str, int]
    backward: Mapping[str, int]

    def variants(self) -> tuple[KernelVariant, KernelVariant]:
        return self._variant("forward", self.forward), self._variant("backward", self.backward)

    def _variant(self, entry: str, constants: Mapping[str, int]) -> KernelVariant:
        return KernelVariant(
            entry=entry,
            template=f"wkv7_chunked_{entry}.cu",
            min_arch=80,
            head_sizes=(self.head_size,),
            dtypes=("bf16",),
            chunk_lengths=(16,),
            constants=lambda config: {
                "checkpoint_tokens": self.span,
                "rounded_checkpoints": int(config.checkpoint_dtype == "bf16"),
                **constants,
            },
            # One limit for both: the entries share their checkpoints.
            shared_bytes=max(self.forward["shared_bytes"], self.backward["shared_bytes"]),
            checkpoint_tokens=self.span,
            checkpoint_dtypes=CHECKPOINT_DTYPES,
        )


_CHUNKED = (
    _Chunked(
        64,
        64,
        {"warps": 4, "blocks": 2, "shared_bytes": 105_536},
        {"warps": 8, "blocks": 1, "shared_bytes": 212_992},
    ),
    _Chunked(
        64,
        64,
        {"warps": 4, "blocks": 1, "shared_bytes": 105_536},
        {"warps": 4, "blocks": 1, "shared_bytes": 166_912},
    ),
    _Chunked(
        64,
        32,
        {"warps": 4, "blocks": 1, "shared_bytes": 69_120},
        {"warps": 4, "blocks": 1, "shared_bytes": 91_136},
    ),
    _Chunked(
        128,
        32,
        {"warps": 8, "blocks": 1, "shared_bytes": 126_976},
        {"warps": 8, "blocks": 1, "shared_bytes": 219_648},
    ),
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
        *(variant for setting in _CHUNKED for variant in setting.variants()),
        *recurrence_variants("wkv7", constants={}, cuda_scratch=(_PRODUCTS,)),
    ),
)
