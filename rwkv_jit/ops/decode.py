"""The serving operators: a few tokens a sequence, on a pool of states that is advanced in place."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import DEFAULT_CHUNK_LENGTH
from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec
from .recurrence import CPU_DTYPES, CPU_HEAD_SIZES, CUDA_DTYPES, cpu_constants
from .tensors import Y
from .wkv5 import WKV5
from .wkv6 import WKV6
from .wkv7 import WKV7

STATE = TensorSpec(
    name="state",
    shape=("P", "H", "N", "N"),
    dtype=("state",),
    meaning="pool of states, advanced in place",
    mutated=True,
)
STATE_INDICES = TensorSpec(
    name="state_indices",
    shape=("B",),
    dtype=("int32",),
    meaning="each row's slot, none twice; -1 skips a row, whose y is 0; row i has slot i if None",
    optional=True,
)
# Tokens that a block of threads has in shared memory, and rows of the state in a lane's registers.
_CPU_STAGE = 8
# blocks: that share a multiprocessor at one token, which bounds the registers of a lane.
_TILES = {
    16: {"warps": 1, "rows_per_lane": 1, "few_rows_per_lane": 1, "stage_tokens": 8, "blocks": 16},
    32: {"warps": 2, "rows_per_lane": 2, "few_rows_per_lane": 1, "stage_tokens": 8, "blocks": 14},
    64: {"warps": 2, "rows_per_lane": 4, "few_rows_per_lane": 1, "stage_tokens": 8, "blocks": 14},
    128: {"warps": 4, "rows_per_lane": 4, "few_rows_per_lane": 1, "stage_tokens": 8, "blocks": 7},
    256: {"warps": 8, "rows_per_lane": 4, "few_rows_per_lane": 1, "stage_tokens": 4, "blocks": 3},
}


def _decode(spec: OpSpec, templates: str, constants: Mapping[str, int]) -> OpSpec:
    """The serving operator of a recurrence, whose kernels are `<templates>_decode.cpp` and `.cu`.

    constants: what those take beside their sizes.
    """
    tokens = tuple(tensor for tensor in spec.called.inputs if not tensor.optional)
    inputs = (*tokens, STATE, STATE_INDICES)
    return OpSpec(
        name=f"{spec.name}_decode",
        summary=f"{spec.name} for serving: a few tokens a sequence, on a pool of states, in place",
        formula=spec.formula,
        parameters=tuple(tensor.name for tensor in inputs),
        entries={"decode": EntrySpec(inputs=inputs, outputs=(Y,), sizes=("B", "T", "H", "P"))},
        saved_outputs=(),
        decays=spec.decays,
        variants=(
            KernelVariant(
                entry="decode",
                template=f"{templates}_decode.cpp",
                min_arch=0,
                head_sizes=CPU_HEAD_SIZES,
                dtypes=CPU_DTYPES,
                chunk_lengths=(DEFAULT_CHUNK_LENGTH,),
                constants=lambda config: {
                    "stage_tokens": _CPU_STAGE,
                    **cpu_constants(config),
                    **constants,
                },
            ),
            KernelVariant(
                entry="decode",
                template=f"{templates}_decode.cu",
                min_arch=80,
                head_sizes=tuple(_TILES),
                dtypes=CUDA_DTYPES,
                chunk_lengths=(DEFAULT_CHUNK_LENGTH,),
                constants=lambda config: {**_TILES[config.head_size], **constants},
            ),
        ),
    )


DECODES = (
    _decode(WKV5, "wkv6", {"decay_per_token": 0}),
    _decode(WKV6, "wkv6", {"decay_per_token": 1}),
    _decode(WKV7, "wkv7", {}),
)
