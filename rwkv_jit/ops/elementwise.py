"""The steps around the recurrence: one pass over tokens each, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from ..config import MAX_HEAD_SIZE, OpConfig
from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec
from .recurrence import CPU_DTYPES, CUDA_DTYPES
from .tensors import gradient

_SIZES = ("B", "T", "S", "C", "G")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many tokens a thread of a GPU reads before it works on them, so that enough is on its
    way, the bytes of each access to memory, of which fewer need fewer registers, and how many
    blocks at least share a multiprocessor, which bounds those; 0 leaves it to the compiler."""

    tokens_at_once: int
    access_bytes: int = 16
    blocks: int = 0


def channels(name: str, meaning: str) -> TensorSpec:
    """A vector a token, in the operator's dtype."""
    return TensorSpec(name=name, shape=("B", "T", "C"), dtype=("op",), meaning=meaning)


def parameter(
    name: str,
    meaning: str,
    *,
    shape: tuple[str, ...] = ("C",),
    optional: bool = False,
) -> TensorSpec:
    """A number a channel, of the operator's dtype or float32."""
    return TensorSpec(
        name=name, shape=shape, dtype=("op", "fp32"), meaning=meaning, optional=optional
    )


def elementwise(
    *,
    name: str,
    summary: str,
    formula: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    saved: Sequence[TensorSpec],
    schedules: Mapping[str, Schedule],
    heads: bool = False,
    scalars: Mapping[str, float] | None = None,
    parameters: Sequence[str] | None = None,
) -> OpSpec:
    """The operator whose kernels, for CPUs and GPUs, are `<name>_forward.h` and `_backward.h`.

    inputs: in the order of the call; those with two dtypes are parameters, whose gradients are sums
        over all tokens.
    saved: of the inputs those that the backward reads.
    schedules: of each entry how a GPU goes about it.
    heads: whether a token's channels are heads of the configuration's size.
    parameters: the public call where it is not inputs and scalars in their order.
    """
    scalars = scalars or {}
    differentiable = [tensor for tensor in inputs if tensor.name != "cu_seqlens"]
    summed = [tensor for tensor in differentiable if "fp32" in tensor.dtype]
    entries = {
        "forward": EntrySpec(
            inputs=tuple(inputs), outputs=tuple(outputs), sizes=_SIZES, scalars=scalars
        ),
        "backward": EntrySpec(
            inputs=(*saved, *map(_arriving, outputs)),
            outputs=tuple(map(_leaving, differentiable)),
            sizes=_SIZES,
            scalars=scalars,
        ),
    }
    scratch = {"forward": (), "backward": tuple(map(_parts, summed))}
    return OpSpec(
        name=name,
        summary=summary,
        formula=formula,
        parameters=tuple(parameters or [*(tensor.name for tensor in inputs), *scalars]),
        entries=entries,
        saved_outputs=(),
        knobs=("head_size",) if heads else (),
        variants=tuple(
            KernelVariant(
                entry=entry,
                template=f"{name}_{entry}.h",
                min_arch=min_arch,
                head_sizes=tuple(range(1, MAX_HEAD_SIZE + 1)) if heads else (0,),
                dtypes=dtypes,
                chunk_lengths=(0,),
                constants=partial(_constants, platform, schedules[entry]),
                scratch=scratch[entry],
            )
            for platform, min_arch, dtypes in (("cpu", 0, CPU_DTYPES), ("cuda", 80, CUDA_DTYPES))
            for entry in entries
        ),
    )


def _constants(platform: str, schedule: Schedule, _: OpConfig) -> Mapping[str, int | str]:
    return {"platform": platform, **asdict(schedule)}


def _arriving(output: TensorSpec) -> TensorSpec:
    """The gradient of an output, which may be missing where the output may be."""
    made = gradient(output)
    return replace(made, optional=output.optional or bool(output.only_with), dtype=output.dtype)


def _leaving(given: TensorSpec) -> TensorSpec:
    """The gradient of an input. A state's is made on request, as is every state."""
    made = gradient(given)
    if given.name == "initial_state":
        return replace(made, optional=True)
    return replace(made, only_with=given.name if given.optional else "")


def _parts(given: TensorSpec) -> TensorSpec:
    """What groups of tokens have of a parameter's gradient."""
    return TensorSpec(
        name=f"{given.name}_parts",
        shape=("G", "C"),
        dtype=("accumulator",),
        meaning=f"each group's part of d{given.name}",
        only_with=given.name if given.optional else "",
    )
