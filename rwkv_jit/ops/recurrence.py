"""The kernels that walk a sequence token by token: what every operator has of them, as rows."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import OpConfig
from ..spec import KernelVariant, TensorSpec
from .tensors import ORDER, STATE

CUDA_DTYPES = ("bf16", "fp16", "fp32")
CPU_DTYPES = (*CUDA_DTYPES, "fp64")
CPU_HEAD_SIZES = tuple(range(8, 257, 8))
CHUNK_LENGTHS = (16, 32, 64)

# Lanes own tiles of rows x columns of the state, in both entries the same, as the checkpoints lie
# in their order. A head of more rows than one block's registers hold is worked off in groups of
# rows (forward: by other blocks, backward: one after another). `blocks` share a multiprocessor.
_ROWS_PER_LANE = {16: 1, 32: 2, 64: 4, 128: 8, 256: 8}
_FORWARD_TILES = {
    16: {"warps": 1, "stage_tokens": 16},
    32: {"warps": 2, "stage_tokens": 16},
    64: {"warps": 4, "stage_tokens": 16},
    128: {"warps": 4, "stage_tokens": 8},
    256: {"warps": 8, "stage_tokens": 4},
}
_BACKWARD_TILES = {
    16: {"warps": 1, "blocks": 4},
    32: {"warps": 2, "blocks": 4},
    64: {"warps": 4, "blocks": 4},
    128: {"warps": 4, "blocks": 2},
    256: {"warps": 2, "blocks": 2},
}
_STEP_TOKENS = 4  # the states kept of a chunk are a quarter of its tokens
_STATES = TensorSpec(
    name="states",
    shape=("S", "H", "Q", "N", "N"),
    dtype=("accumulator",),
    meaning="the state before each step of a chunk",
)
_DSTATE = TensorSpec(
    name="dstate",
    shape=STATE,
    dtype=("accumulator",),
    meaning="gradient of the state, of the groups of rows that are not being worked on",
)


def recurrence_variants(
    templates: str,
    constants: Mapping[str, int],
    backward_scratch: tuple[TensorSpec, ...] = (),
    cuda_scratch: tuple[TensorSpec, ...] = (),
) -> tuple[KernelVariant, ...]:
    """The variants of `<templates>_forward.cpp`, `_backward.cpp`, `_forward.cu` and
    `_backward.cu`.

    constants: what the templates take beside their sizes.
    backward_scratch: tensors that both backward launchers need.
    cuda_scratch: tensors that the CUDA one needs beside them.
    """
    cpu = [
        KernelVariant(
            entry=entry,
            template=f"{templates}_{entry}.cpp",
            min_arch=0,
            head_sizes=CPU_HEAD_SIZES,
            dtypes=CPU_DTYPES,
            chunk_lengths=CHUNK_LENGTHS,
            constants=lambda config: {**cpu_constants(config), **constants},
            scratch=scratch,
        )
        for entry, scratch in (("forward", ()), ("backward", backward_scratch))
    ]
    forward = KernelVariant(
        entry="forward",
        template=f"{templates}_forward.cu",
        min_arch=80,
        head_sizes=tuple(_FORWARD_TILES),
        dtypes=CUDA_DTYPES,
        chunk_lengths=CHUNK_LENGTHS,
        constants=lambda config: {
            "rows_per_lane": _ROWS_PER_LANE[config.head_size],
            **_FORWARD_TILES[config.head_size],
            **constants,
        },
        scratch=(ORDER,),
    )
    backward = [
        KernelVariant(
            entry="backward",
            template=f"{templates}_backward.cu",
            min_arch=80,
            head_sizes=head_sizes,
            dtypes=CUDA_DTYPES,
            chunk_lengths=CHUNK_LENGTHS,
            constants=lambda config: {
                "rows_per_lane": _ROWS_PER_LANE[config.head_size],
                **_BACKWARD_TILES[config.head_size],
                "step_tokens": _STEP_TOKENS,
                **constants,
            },
            scratch=(*backward_scratch, *cuda_scratch, _STATES, *waiting),
        )
        for head_sizes, waiting in (((16, 32, 64), ()), ((128, 256), (_DSTATE,)))
    ]
    return (*cpu, forward, *backward)


def cpu_constants(config: OpConfig) -> Mapping[str, int]:
    """What `cpu_types.h` takes: the bytes of a vector that divides a row."""
    widest = widest_vector(config.arch)
    row_bytes = config.head_size * (8 if config.dtype == "fp64" else 4)
    return {"vector_bytes": widest if row_bytes % widest == 0 else 32}


def widest_vector(arch: str) -> int:
    """Bytes of a CPU's vectors."""
    return {"x86_64_v4": 64, "x86_64_v3": 32}.get(arch, 16)
