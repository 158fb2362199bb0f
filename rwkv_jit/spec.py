"""OpSpec: what an operator is, as data. Four readers share its tensor lists: the argument checks,
the allocation of outputs, the launcher's argument block and the documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .arch import arch_number, is_cuda, shared_memory
from .config import OpConfig, default_state_dtype, not_a_size
from .errors import ConfigError

# Bumped whenever the launcher's argument block or its exported functions change meaning.
LAUNCHER_ABI = 1
# Fields of OpConfig that not every operator has. The sizes among them are 0 where it has not.
SIZES = ("head_size", "chunk_length")
RECURRENCE_KNOBS = (*SIZES, "decay", "state_dtype", "state_layout", "checkpoint_dtype", "bounded")
KNOBS = (*RECURRENCE_KNOBS, "precision")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of an entry.

    shape: letters: B batch, S sequences, T tokens, H heads, N head size, C channels, H * N where
        there are heads, P slots of a pool of states, L tokens between two state checkpoints, Q a
        quarter of them, K state checkpoints, which are B * T // L + S, D sequences' heads that
        blocks share, E numbers of the turns in which they do, and G groups of tokens, of each of
        which a block makes a part of a sum over all tokens.
    dtype: the dtypes that it may have: "op" (the operator's), "state", "accumulator" (float32, or
        float64 for a float64 operator), "like:<tensor>", or a dtype's name. Where there are
        several, the argument block says at run time which one it is.
    optional: an input that may be None, or an output that is made only when asked for.
    only_with: an optional input; the output or scratch tensor exists where that is given.
    last_axis_optional: an input that may be given without its last axis, N, and is then the same
        all along it.
    mutated: an input that the kernel writes to. It is never copied.
    """

    name: str
    shape: tuple[str, ...]
    dtype: tuple[str, ...]
    meaning: str
    optional: bool = False
    only_with: str = ""
    last_axis_optional: bool = False
    mutated: bool = False

    @property
    def has_dtype_field(self) -> bool:
        """Whether the launcher must be told the dtype at run time."""
        return len(self.dtype) > 1 or self.dtype[0].startswith("like:")


@dataclass(frozen=True, slots=True, kw_only=True)
class EntrySpec:
    """The tensors of one entry point, in the order of the argument block, and the sizes that its
    launcher is told.

    scalars: numbers that it takes beside them, and what they are where they are not given.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[str, ...] = ("S", "T", "H")
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def optional_outputs(self) -> tuple[str, ...]:
        """Names of the outputs that are made only when asked for."""
        return tuple(tensor.name for tensor in self.outputs if tensor.optional)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelVariant:
    """One template and the configurations that it serves. The first variant of a spec that serves
    a configuration is the one used, so faster variants stand first.

    min_arch: smallest compute capability (major * 10 + minor), or 0 for a CPU template.
    only_arch: the slug of the one architecture that it is for, if it needs that one's own features.
    constants: further values of the template, by name, worked out from the configuration.
    scratch: tensors that the launcher needs and nobody sees.
    shared_bytes: shared memory of a block; architectures whose blocks have less are not served.
    checkpoint_tokens: tokens between two state checkpoints; 0 is the chunk length. The forward and
        backward variants of a configuration have the same.
    checkpoint_dtypes: what those may be stored in, first what they are if none is chosen.
    uses_bound: whether it is another kernel where decays are declared to be bounded.
    needs_bound: whether it is for bounded decays alone.
    needs_tf32: whether it rounds operands of products to tf32, for which it must be allowed to.
    """

    entry: str
    template: str
    min_arch: int
    head_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    chunk_lengths: tuple[int, ...]
    constants: Callable[[OpConfig], Mapping[str, int | str]]
    scratch: tuple[TensorSpec, ...] = ()
    only_arch: str = ""
    shared_bytes: int = 0
    checkpoint_tokens: int = 0
    checkpoint_dtypes: tuple[str, ...] = ("accumulator",)
    uses_bound: bool = False
    needs_bound: bool = False
    needs_tf32: bool = False

    def checkpoint_dtype(self, config: OpConfig) -> str:
        """What state checkpoints are stored in, "accumulator" or "bf16"."""
        chosen = config.checkpoint_dtype
        return self.checkpoint_dtypes[0] if chosen == "auto" else chosen

    def runs_on(self, arch: str) -> bool:
        """Whether this variant's kernel runs on `arch`."""
        if is_cuda(arch) != (self.min_arch > 0) or self.only_arch not in ("", arch):
            return False
        return arch_number(arch) >= self.min_arch and self.shared_bytes <= shared_memory(arch)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """An operator: its tensors, its kernels, and the source of its formula.

    entries: the first is the one that is called.
    In `entries["backward"]` a tensor named like one of the forward entry is that tensor, saved;
    `d<name>` is the gradient of `<name>`. In the forward entry `saved_outputs` are the outputs that
    exist for the backward alone. `parameters` is the public call: inputs by name, scalars, and
    `output_<name>` for each output that is made only when asked for. `knobs` are the fields of
    OpConfig that the operator has beside dtype and arch; the others are at their defaults.
    """

    name: str
    summary: str
    formula: str
    parameters: tuple[str, ...]
    entries: Mapping[str, EntrySpec]
    saved_outputs: tuple[str, ...]
    variants: tuple[KernelVariant, ...] = field(repr=False)
    decays: tuple[str, ...] = ("loglog",)
    knobs: tuple[str, ...] = RECURRENCE_KNOBS

    @property
    def called(self) -> EntrySpec:
        """The entry that is called: "forward", "decode" or "prefill"."""
        return next(iter(self.entries.values()))

    @property
    def is_serving(self) -> bool:
        """Whether it is for serving: on a pool of states, in place, without gradients."""
        return any(tensor.mutated for tensor in self.called.inputs)

    @property
    def is_recurrence(self) -> bool:
        """Whether it takes tokens one after another, and so has states and decays."""
        return "decay" in self.knobs

    def reference_options(self, config: OpConfig) -> Mapping[str, str]:
        """What its reference takes of `config`, by name."""
        names = ("decay", "state_layout")
        return {name: getattr(config, name) for name in names if name in self.knobs}

    def variant(self, config: OpConfig, entry: str) -> KernelVariant:
        """The kernel that serves `config`. Raises ConfigError with what could be chosen instead."""
        here = [v for v in self.variants if v.entry == entry and v.runs_on(config.arch)]
        for variant in here:
            if (
                config.head_size in variant.head_sizes
                and config.dtype in variant.dtypes
                and config.chunk_length in variant.chunk_lengths
                and config.checkpoint_dtype in ("auto", *variant.checkpoint_dtypes)
                and (config.decays_are_bounded or not variant.needs_bound)
                and (config.precision == "tf32" or not variant.needs_tf32)
            ):
                return variant
        raise ConfigError(self._refusal(config, here))

    def check(self, config: OpConfig) -> None:
        """Raise ConfigError unless every entry of the operator has a kernel for `config`."""
        for name in SIZES:
            value = getattr(config, name)
            if value == 0 and name in self.knobs:
                raise not_a_size(self.name, name, value)
        narrowed = self.narrowed(config)
        for name in KNOBS:
            value = getattr(config, name)
            if value != getattr(narrowed, name):
                raise ConfigError(f"{self.name}: has no {name}, but it is {value!r}; leave it out")
        if config.decay not in self.decays:
            raise ConfigError(
                f"{self.name}: decay={config.decay!r} is not supported; "
                f"choose from {', '.join(self.decays)}"
            )
        if (config.dtype == "fp64") != (config.state_dtype == "fp64"):
            raise ConfigError(
                f"{self.name}: state_dtype={config.state_dtype!r} does not go with "
                f"dtype={config.dtype!r}; float64 operators keep float64 states, others do not"
            )
        used = self.without_idle(config)
        for idle, what in (
            (config.precision != used.precision, f"precision={config.precision!r}"),
            (config.bounded != used.bounded, "a bound on the decays"),
        ):
            if idle:
                raise ConfigError(
                    f"{self.name}: {what} changes nothing in kernels like {config.slug}; "
                    "leave it out"
                )
        spacings = {self.checkpoint_spacing(config, entry) for entry in self.entries}
        assert len(spacings) == 1, "both entries share the checkpoints"

    def narrowed(self, config: OpConfig) -> OpConfig:
        """`config` for this operator, with what that has no knob for at its default."""
        plain = OpConfig(
            op=self.name,
            dtype=config.dtype,
            arch=config.arch,
            state_dtype=default_state_dtype(config.dtype),
        )
        return replace(plain, **{name: getattr(config, name) for name in self.knobs})

    def without_idle(self, config: OpConfig) -> OpConfig:
        """`config` less what is chosen, allowed or declared but makes no other kernel: checkpoints
        as they are anyway, tf32 where none rounds to it, bounds where none uses them or with
        "logit", which is bounded as it is."""
        if config.checkpoint_dtype != "auto" and "checkpoint_dtype" in self.knobs:
            usual = self.variant(config, next(iter(self.entries))).checkpoint_dtypes[0]
            if config.checkpoint_dtype == usual:
                config = replace(config, checkpoint_dtype="auto")
        if config.precision == "tf32" and "precision" in self.knobs:
            used = any(self.variant(config, entry).needs_tf32 for entry in self.entries)
            config = replace(config, precision="tf32" if used else "float32")
        if config.bounded:
            used = any(self.variant(config, entry).uses_bound for entry in self.entries)
            config = replace(config, bounded=used and config.decay != "logit")
        return config

    def checkpoint_spacing(self, config: OpConfig, entry: str) -> int:
        """Tokens between two state checkpoints."""
        return self.variant(config, entry).checkpoint_tokens or config.chunk_length

    def checkpoint_dtype(self, config: OpConfig) -> str:
        """What those are stored in, "accumulator" or "bf16"."""
        return self.variant(config, "forward").checkpoint_dtype(config)

    def _refusal(self, config: OpConfig, here: list[KernelVariant]) -> str:
        shown = f"sm_{config.arch[2:]}" if is_cuda(config.arch) else config.arch
        if not here:
            return f"{self.name} has no kernel for {shown}"
        for name, rows in (
            ("head_size", [v.head_sizes for v in here]),
            ("dtype", [v.dtypes for v in here]),
            ("chunk_length", [v.chunk_lengths for v in here]),
        ):
            value = getattr(config, name)
            choices = sorted({choice for row in rows for choice in row})
            if value not in choices:
                return (
                    f"{self.name}: {name}={value} is not supported on {shown}; "
                    f"choose from {', '.join(map(str, choices))}"
                )
        served = [v for v in here if config.checkpoint_dtype in v.checkpoint_dtypes]
        if not served:
            return (
                f"{self.name}: checkpoint_dtype={config.checkpoint_dtype} is not supported on "
                f"{shown}; leave it out"
            )
        return (
            f"{self.name}: on {shown} checkpoint_dtype={config.checkpoint_dtype} goes with "
            f"{_listed('dtype', served, lambda v: v.dtypes)}, "
            f"{_listed('head_size', served, lambda v: v.head_sizes)} and "
            f"{_listed('chunk_length', served, lambda v: v.chunk_lengths)} alone"
        )


def _listed(
    name: str,
    variants: list[KernelVariant],
    choices: Callable[[KernelVariant], tuple[int | str, ...]],
) -> str:
    """A knob and what the variants serve of it, as `head_size 64 or 128`."""
    values = dict.fromkeys(value for variant in variants for value in choices(variant))
    return f"{name} {' or '.join(map(str, values))}"
