"""The serving operators of prompts: whole sequences, on a pool of states that is advanced in place,
by the kernels of the forward."""

from __future__ import annotations

from dataclasses import replace

from ..config import DEFAULT_CHUNK_LENGTH
from ..spec import EntrySpec, OpSpec
from .decode import STATE, STATE_INDICES
from .tensors import CU_SEQLENS, Y
from .wkv5 import WKV5
from .wkv6 import WKV6
from .wkv7 import WKV7

_BOUNDS = replace(
    CU_SEQLENS,
    meaning="where each packed sequence begins, and the end of the last; y is 0 behind it",
)
_SLOTS = replace(
    STATE_INDICES,
    shape=("S",),
    meaning="each sequence's slot, none twice; -1 skips a sequence, whose y is 0; "
    "sequence s has slot s if None",
)


def _prefill(spec: OpSpec) -> OpSpec:
    """The serving operator of a recurrence whose kernels are those of its forward."""
    tokens = tuple(tensor for tensor in spec.called.inputs if not tensor.optional)
    inputs = (*tokens, STATE, _BOUNDS, _SLOTS)
    return OpSpec(
        name=f"{spec.name}_prefill",
        summary=f"{spec.name} for serving: whole sequences, on a pool of states, in place",
        formula=spec.formula,
        parameters=tuple(tensor.name for tensor in inputs),
        entries={"prefill": EntrySpec(inputs=inputs, outputs=(Y,), sizes=("S", "T", "H", "P"))},
        saved_outputs=(),
        decays=spec.decays,
        knobs=spec.knobs,
        variants=tuple(
            replace(
                variant,
                entry="prefill",
                chunk_lengths=(DEFAULT_CHUNK_LENGTH,),
                checkpoint_dtypes=("accumulator",),
            )
            for variant in spec.variants
            if variant.entry == "forward"
        ),
    )


PREFILLS = (_prefill(WKV5), _prefill(WKV6), _prefill(WKV7))
