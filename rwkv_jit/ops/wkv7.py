"""wkv7: the RWKV-7 time-mixing recurrence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import OpConfig
from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec

_TOKENS = ("B", "T", "H", "N")
_STATE = ("S", "H", "N", "N")
_CUDA_DTYPES = ("bf16", "fp16", "fp32")
_CPU_DTYPES = (*_CUDA_DTYPES, "fp64")
_CHUNK_LENGTHS = (16, 32, 64)


def _token(name: str, meaning: str) -> TensorSpec:
    return TensorSpec(name=name, shape=_TOKENS, dtype=("op",), meaning=meaning)


_R = _token("r", "receptance")
_W = TensorSpec(name="w", shape=_TOKENS, dtype=("op", "fp32"), meaning="decay, see decay=")
_K = _token("k", "key")
_V = _token("v", "value")
_A = _token("a", "first vector of the rank-1 update; -kk in the model")
_B = _token("b", "second vector of the rank-1 update; kk * a_gate in the model")
_CU_SEQLENS = TensorSpec(
    name="cu_seqlens",
    shape=("S+1",),
    dtype=("int32", "int64"),
    meaning="where each packed sequence begins, and the end of the last",
    optional=True,
)
_CHECKPOINTS = TensorSpec(
    name="checkpoints",
    shape=("C", "H", "N", "N"),
    dtype=("accumulator",),
    meaning="the state before each chunk, in the kernel's own order",
    optional=True,
)


def _state(name: str, meaning: str) -> TensorSpec:
    return TensorSpec(name=name, shape=_STATE, dtype=("state",), meaning=meaning, optional=True)


def _gradient(of: TensorSpec) -> TensorSpec:
    like = f"like:{of.name}" if len(of.dtype) > 1 else of.dtype[0]
    return TensorSpec(
        name=f"d{of.name}", shape=of.shape, dtype=(like,), meaning=f"gradient of {of.name}"
    )


def _cpu_constants(config: OpConfig) -> Mapping[str, int]:
    widest = {"x86_64_v4": 64, "x86_64_v3": 32}.get(config.arch, 16)
    row_bytes = config.head_size * (8 if config.dtype == "fp64" else 4)
    return {"vector_bytes": widest if row_bytes % widest == 0 else 32}


# Lanes own tiles of rows x columns of the state; a head of more rows than one block's registers
# hold is worked off in groups of rows (forward: by other blocks, backward: one after another).
_FORWARD_TILES = {
    16: {"warps": 1, "rows_per_lane": 1, "stage_tokens": 16},
    32: {"warps": 2, "rows_per_lane": 2, "stage_tokens": 16},
    64: {"warps": 4, "rows_per_lane": 4, "stage_tokens": 16},
    128: {"warps": 8, "rows_per_lane": 4, "stage_tokens": 8},
    256: {"warps": 8, "rows_per_lane": 4, "stage_tokens": 4},
}
_BACKWARD_TILES = {
    16: {"warps": 1, "rows_per_lane": 1, "step_tokens": 4},
    32: {"warps": 2, "rows_per_lane": 2, "step_tokens": 4},
    64: {"warps": 8, "rows_per_lane": 2, "step_tokens": 4},
    128: {"warps": 8, "rows_per_lane": 2, "step_tokens": 2},
    256: {"warps": 4, "rows_per_lane": 2, "step_tokens": 2},
}
_DSTATE = TensorSpec(
    name="dstate",
    shape=_STATE,
    dtype=("accumulator",),
    meaning="gradient of the state, of the groups of rows that are not being worked on",
)


# On tensor cores: how much a block works on at once, by what shared memory allows. Checkpoints stand
# before each span, whose chunks a block's warps prepare side by side; `blocks` share a multiprocessor.
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
            constants=lambda _config: {"checkpoint_tokens": self.span, **constants},
            # One limit for both: the entries share their checkpoints.
            shared_bytes=max(self.forward["shared_bytes"], self.backward["shared_bytes"]),
            checkpoint_tokens=self.span,
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


def _variants() -> tuple[KernelVariant, ...]:
    cpu = [
        KernelVariant(
            entry=entry,
            template=f"wkv7_{entry}.cpp",
            min_arch=0,
            head_sizes=tuple(range(8, 257, 8)),
            dtypes=_CPU_DTYPES,
            chunk_lengths=_CHUNK_LENGTHS,
            constants=_cpu_constants,
        )
        for entry in ("forward", "backward")
    ]
    forward = KernelVariant(
        entry="forward",
        template="wkv7_forward.cu",
        min_arch=80,
        head_sizes=tuple(_FORWARD_TILES),
        dtypes=_CUDA_DTYPES,
        chunk_lengths=_CHUNK_LENGTHS,
        constants=lambda config: _FORWARD_TILES[config.head_size],
    )
    backward = [
        KernelVariant(
            entry="backward",
            template="wkv7_backward.cu",
            min_arch=80,
            head_sizes=head_sizes,
            dtypes=_CUDA_DTYPES,
            chunk_lengths=_CHUNK_LENGTHS,
            constants=lambda config: _BACKWARD_TILES[config.head_size],
            scratch=scratch,
        )
        for head_sizes, scratch in (((16, 32, 64), ()), ((128, 256), (_DSTATE,)))
    ]
    chunked = [variant for setting in _CHUNKED for variant in setting.variants()]
    return (*cpu, *chunked, forward, *backward)


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
            inputs=(
                _R,
                _W,
                _K,
                _V,
                _A,
                _B,
                _CU_SEQLENS,
                _state("initial_state", "state before the first token; zeros if None"),
            ),
            outputs=(
                _token("y", "output"),
                _state("final_state", "state after the last token"),
                _CHECKPOINTS,
            ),
        ),
        "backward": EntrySpec(
            inputs=(
                _R,
                _W,
                _K,
                _V,
                _A,
                _B,
                _CU_SEQLENS,
                _CHECKPOINTS,
                _token("dy", "gradient of y"),
                _state("dfinal_state", "gradient of final_state; zeros if None"),
            ),
            outputs=(
                *map(_gradient, (_R, _W, _K, _V, _A, _B)),
                _state("dinitial_state", "gradient of initial_state"),
            ),
        ),
    },
    saved_outputs=("checkpoints",),
    decays=("loglog", "logit", "log"),
    variants=_variants(),
)
