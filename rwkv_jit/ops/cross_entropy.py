"""l2wrap_cross_entropy: the loss of RWKV's training, token by token."""

from __future__ import annotations

from collections.abc import Mapping

from ..arch import is_cuda
from ..config import OpConfig
from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec
from .elementwise import channels
from .recurrence import CPU_DTYPES, CUDA_DTYPES, widest_vector
from .tensors import gradient

_SIZES = ("B", "T", "C")
_TOKENS = ("B", "T")


def _of_token(name: str, meaning: str) -> TensorSpec:
    return TensorSpec(name=name, shape=_TOKENS, dtype=("accumulator",), meaning=meaning)


_LOGITS = channels("logits", "of each class, which are the channels here")
_TARGETS = TensorSpec(
    name="targets", shape=_TOKENS, dtype=("int64",), meaning="the right class, or -1 for no loss"
)
_LOSS = _of_token("loss", "cross entropy; 0 for target -1, not a number for no class")
_MAXIMUM = _of_token("maximum", "largest logit; 0 for target -1")
_LOGSUM = _of_token("logsum", "log of the sum of all exp(logit - maximum)")
_ARGMAX = TensorSpec(
    name="argmax", shape=_TOKENS, dtype=("int32",), meaning="the first class that has the maximum"
)


def _constants(config: OpConfig) -> Mapping[str, int]:
    return {} if is_cuda(config.arch) else {"vector_bytes": widest_vector(config.arch)}


L2WRAP_CROSS_ENTROPY = OpSpec(
    name="l2wrap_cross_entropy",
    summary="cross entropy of each token, and its largest logit, which RWKV's L2Wrap holds small",
    formula="loss = log(sum_c exp(logit_c)) - logit_target,   maximum = max_c logit_c",
    parameters=("logits", "targets"),
    entries={
        "forward": EntrySpec(
            inputs=(_LOGITS, _TARGETS),
            outputs=(_LOSS, _MAXIMUM, _LOGSUM, _ARGMAX),
            sizes=_SIZES,
        ),
        "backward": EntrySpec(
            inputs=(
                _LOGITS,
                _TARGETS,
                _MAXIMUM,
                _LOGSUM,
                _ARGMAX,
                gradient(_LOSS),
                gradient(_MAXIMUM),
            ),
            outputs=(gradient(_LOGITS),),
            sizes=_SIZES,
        ),
    },
    saved_outputs=("logsum", "argmax"),
    knobs=(),
    variants=tuple(
        KernelVariant(
            entry=entry,
            template=f"l2wrap_cross_entropy_{entry}.{suffix}",
            min_arch=min_arch,
            head_sizes=(0,),
            dtypes=dtypes,
            chunk_lengths=(0,),
            constants=_constants,
        )
        for suffix, min_arch, dtypes in (("cpp", 0, CPU_DTYPES), ("cu", 80, CUDA_DTYPES))
        for entry in ("forward", "backward")
    ),
)
