"""The serving operators: a few tokens a sequence, on a pool of states that is advanced in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..arch import arch_number
from ..config import DEFAULT_CHUNK_LENGTH, OpConfig
from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec
from .recurrence import CPU_DTYPES, CPU_HEAD_SIZES, CUDA_DTYPES, cpu_constants
from .tensors import R, V, W, Y, token
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


def _tile(config: OpConfig, *, fused: bool) -> Mapping[str, int]:
    tile = _TILES[config.head_size]
    # There the compiler needs a register more than fourteen blocks of 64 threads leave to a lane.
    tight = fused and (arch_number(config.arch) >= 120 or config.state_dtype != "fp32")
    return {**tile, "blocks": tile["blocks"] * 6 // 7} if tight else tile


def _decode(
    spec: OpSpec,
    templates: str,
    constants: Mapping[str, int],
    *,
    fused: EntrySpec | None = None,
) -> OpSpec:
    """The serving operator of a recurrence, whose kernels are `<templates>_decode.cpp` and `.cu`.

    constants: what those take beside their sizes.
    fused: the tokens and outputs of the one that begins with what a model projects.
    """
    entry = fused or EntrySpec(inputs=spec.called.inputs, outputs=(Y,))
    inputs = (*(t for t in entry.inputs if not t.optional), STATE, STATE_INDICES)
    entry = EntrySpec(inputs=inputs, outputs=entry.outputs, sizes=("B", "T", "H", "P"))
    of = "and what is before it in a model, " if fused else ""
    return OpSpec(
        name=f"{spec.name}_decode{'_fused' if fused else ''}",
        summary=(
            f"{spec.name} {of}for serving: a few tokens a sequence, on a pool of states, in place"
        ),
        formula=f"{_BEFORE if fused else ''}{spec.formula}",
        parameters=tuple(tensor.name for tensor in inputs),
        entries={"decode": entry},
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
                constants=lambda config: {**_tile(config, fused=fused is not None), **constants},
            ),
        ),
    )


def _parameter(name: str, meaning: str) -> TensorSpec:
    """A parameter of a model's layer."""
    return TensorSpec(name=name, shape=("H", "N"), dtype=("op", "fp32"), meaning=meaning)


_BEFORE = (
    "kk = normalize(k_k * k), g = sigmoid(a0 + a); with w0 + w for w, k * (1 + (g - 1) * k_a) for "
    "k, -kk for a and kk * g for b:   "
)
_FUSED = EntrySpec(
    inputs=(
        R,
        replace(W, meaning="projection of the decay, to which w0 is added, see decay="),
        token("k", "projection of the key"),
        V,
        token("a", "projection of the gate, to which a0 is added"),
        _parameter("w0", "bias of w"),
        _parameter("a0", "bias of a"),
        _parameter("k_k", "what k is multiplied by before it is normalised to kk"),
        _parameter("k_a", "how much of the gate the key takes"),
    ),
    outputs=(Y, token("new_k", "key after the gate, k * (1 + (g - 1) * k_a)")),
)

DECODES = (
    _decode(WKV5, "wkv6", {"decay_per_token": 0}),
    _decode(WKV6, "wkv6", {"decay_per_token": 1}),
    _decode(WKV7, "wkv7", {"fused": 0}),
    _decode(WKV7, "wkv7", {"fused": 1}, fused=_FUSED),
)
