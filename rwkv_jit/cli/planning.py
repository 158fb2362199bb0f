"""Planning: which kernels a choice of knobs asks for."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..arch import arch_number, cuda_arch_of_capability, host_cpu_arch, is_cuda, parse_arch
from ..config import DEFAULT_CHUNK_LENGTH, DTYPES, OpConfig, default_state_dtype, is_bounded
from ..errors import ConfigError
from ..kernel_list import read_kernels
from ..ops import SPECS, get_spec
from ..render import RenderedSource, render
from ..settings import Settings
from ..spec import OpSpec

DEFAULT_HEAD_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Values of each knob; every combination is meant, of the knobs that an operator has. Nothing
    is the default: all operators and entries, head size 64, bf16 for CUDA and fp32 for a CPU, chunk
    length 16, decay "loglog", the dtype's own state dtype, layout "vk", checkpoints as they are
    computed, precision "float32", decays unbounded. archs are in slug form and have no default."""

    archs: tuple[str, ...]
    ops: tuple[str, ...] = ()
    head_sizes: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    chunk_lengths: tuple[int, ...] = ()
    decays: tuple[str, ...] = ()
    state_dtypes: tuple[str, ...] = ()
    state_layouts: tuple[str, ...] = ()
    checkpoint_dtypes: tuple[str, ...] = ()
    precision: str = "float32"
    lower_bound: float | None = None
    entries: tuple[str, ...] = ()


def default_archs(settings: Settings) -> tuple[str, ...]:
    """The architectures of the settings' list, else of the GPUs at hand, else of this CPU.

    A list made for other programs may name GPUs that are too old; they are skipped with a warning.
    An architecture without a suffix stands for what a device of it asks for (9.0 for sm90a).
    """
    if not settings.cuda_arch_list:
        return gpu_archs() or (host_cpu_arch(),)
    archs: list[str] = []
    problem: ConfigError | None = None
    for text in settings.cuda_arch_list:
        try:
            arch = parse_arch(text)
        except ConfigError as error:
            warnings.warn(f"rwkv_jit: {error}; it is skipped", RuntimeWarning, stacklevel=2)
            problem = error
            continue
        if is_cuda(arch) and arch[-1].isdigit():
            arch = cuda_arch_of_capability(*divmod(arch_number(arch), 10))
        archs.append(arch)
    if not archs and problem is not None:
        raise problem
    return tuple(dict.fromkeys(archs))


def gpu_archs() -> tuple[str, ...]:
    """The architectures of the GPUs that torch finds, the current one first."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return ()
    devices = [torch.cuda.current_device(), *range(torch.cuda.device_count())]
    capabilities = [torch.cuda.get_device_capability(device) for device in devices]
    return tuple(dict.fromkeys(cuda_arch_of_capability(*pair) for pair in capabilities))


def plan(choices: Choices) -> list[RenderedSource]:
    """The sources of every kernel that is meant. Raises ConfigError for a combination that a named
    operator has no kernel for, or, where no operator is named, that none has."""
    specs = [get_spec(name) for name in choices.ops] or list(SPECS.values())
    found: dict[str, RenderedSource] = {}
    for config in _combinations(choices, specs[0].name):
        refusals = []
        for spec in specs:
            try:
                sources = _render_entries(spec, replace(config, op=spec.name), choices.entries)
            except ConfigError as error:
                refusals.append(error)
                continue
            found.update((source.identity, source) for source in sources)
        if refusals and (choices.ops or len(refusals) == len(specs)):
            raise refusals[0]
    return list(found.values())


def plan_from(path: Path, archs: Sequence[str]) -> list[RenderedSource]:
    """The sources of the kernels in a list of them; for `archs` where there are any,
    instead of those of the file. Raises ConfigError."""
    found: dict[str, RenderedSource] = {}
    for config, entry in read_kernels(path):
        for arch in archs or (config.arch,):
            spec = get_spec(config.op)
            there = spec.without_idle(replace(config, arch=arch))
            source = render(spec, there, entry)
            found[source.identity] = source
    return list(found.values())


def plan_all(ops: Sequence[str], archs: Sequence[str]) -> list[RenderedSource]:
    """The sources of every head size and dtype that operators have kernels for on architectures,
    in other knobs the defaults; of the steps around a recurrence, which have any head size, those
    that a recurrence has. ops: all operators if there are none."""
    sources: list[RenderedSource] = []
    for spec in [get_spec(name) for name in ops] or SPECS.values():
        for arch in archs:
            here = [variant for variant in spec.variants if variant.runs_on(arch)]
            served = {size for variant in here for size in variant.head_sizes if size}
            sizes = sorted(served & _recurrent_sizes(arch))
            dtypes = [d for d in DTYPES if any(d in variant.dtypes for variant in here)]
            for head_size, dtype in itertools.product(sizes or [DEFAULT_HEAD_SIZE], dtypes):
                choices = Choices(archs=(arch,), head_sizes=(head_size,), dtypes=(dtype,))
                (config,) = _combinations(choices, spec.name)
                with contextlib.suppress(ConfigError):
                    sources += _render_entries(spec, config, ())
    return sources


def _combinations(choices: Choices, op: str) -> Iterator[OpConfig]:
    for arch, head_size, chunk_length, decay, state_layout, checkpoint_dtype in itertools.product(
        choices.archs,
        choices.head_sizes or (DEFAULT_HEAD_SIZE,),
        choices.chunk_lengths or (DEFAULT_CHUNK_LENGTH,),
        choices.decays or ("loglog",),
        choices.state_layouts or ("vk",),
        choices.checkpoint_dtypes or ("auto",),
    ):
        for dtype in choices.dtypes or ("bf16" if is_cuda(arch) else "fp32",):
            for state_dtype in choices.state_dtypes or (default_state_dtype(dtype),):
                yield OpConfig(
                    op=op,
                    head_size=head_size,
                    dtype=dtype,
                    chunk_length=chunk_length,
                    arch=arch,
                    decay=decay,
                    state_dtype=state_dtype,
                    state_layout=state_layout,
                    checkpoint_dtype=checkpoint_dtype,
                    precision=choices.precision,
                    bounded=is_bounded(op, dtype, choices.lower_bound),
                )


def _recurrent_sizes(arch: str) -> set[int]:
    return {
        size
        for spec in SPECS.values()
        if spec.is_recurrence
        for variant in spec.variants
        if variant.runs_on(arch)
        for size in variant.head_sizes
    }


def _render_entries(
    spec: OpSpec, config: OpConfig, entries: tuple[str, ...]
) -> list[RenderedSource]:
    for entry in entries:
        if entry not in spec.entries:
            raise ConfigError(
                f"{spec.name}: entry={entry!r} does not exist; "
                f"choose from {', '.join(spec.entries)}"
            )
    config = spec.without_idle(spec.narrowed(config))
    return [render(spec, config, entry) for entry in entries or spec.entries]
