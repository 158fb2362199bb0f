"""OpConfig: which kernel is wanted. Frozen, hashable, and the only carrier of knobs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .arch import parse_arch
from .errors import ConfigError

DTYPES = ("bf16", "fp16", "fp32", "fp64")
DECAYS = ("loglog", "logit", "log", "factor")
STATE_LAYOUTS = ("vk", "kv")
# The states that the forward keeps for the backward: as the kernels would have it, in the dtype
# that is computed in, or rounded.
CHECKPOINT_DTYPES = ("auto", "accumulator", "bf16")
# What results are computed to: float32's own, or with operands of products rounded to tf32.
PRECISIONS = ("float32", "tf32")
# Heads of sequences that blocks of a chunked backward take turns at; more keep a GPU busy anyway.
MOST_SHARED = 4096
ENTRIES = ("forward", "backward", "decode", "prefill")
MAX_HEAD_SIZE = 256
DEFAULT_CHUNK_LENGTH = 16
# What a bound on log d, declared by the caller, must be at least to make a difference to kernels.
_BOUNDED_FROM = {"fp16": -0.61}
_BOUNDED_FROM_ELSE = -8.0

_SLUG = re.compile(
    r"(?P<op>[a-z][a-z0-9]*(?:_[a-z0-9]+)*?)(?:_n(?P<head_size>\d+))?"
    r"_(?P<dtype>bf16|fp16|fp32|fp64)(?:_l(?P<chunk_length>\d+))?"
    r"_(?P<arch>sm\d+[af]?|x86_64_v\d|aarch64)"
    r"(?:_(?P<decay>logit|log|factor))?(?:_s(?P<state_dtype>bf16|fp16|fp32|fp64))?(?P<layout>_kv)?"
    r"(?:_c(?P<checkpoint_dtype>accumulator|bf16))?(?:_(?P<precision>tf32))?(?P<bounded>_bounded)?",
    # Digits of other scripts are no part of an identifier.
    re.ASCII,
)


def default_state_dtype(dtype: str) -> str:
    """float32, or float64 where the operator itself computes in float64."""
    return "fp64" if dtype == "fp64" else "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpConfig:
    """One exact configuration of one operator.

    op: name of the operator, e.g. "wkv7".
    dtype: of the tokens' vectors and what is made of them, one of DTYPES.
    arch: in slug form, e.g. "sm90a" or "x86_64_v3".
    head_size: N; 0 for an operator that knows no heads.
    chunk_length: L, tokens between two state checkpoints; 0 for an operator without.
    decay: what w means, one of DECAYS.
    state_dtype: of initial_state and final_state.
    state_layout: order of the state's last two axes, "vk" (value, key) or "kv".
    checkpoint_dtype: of the states kept for the backward, one of CHECKPOINT_DTYPES.
    precision: what a float32 operator may round operands of products to, one of PRECISIONS.
    bounded: whether the caller says that log d is nowhere below `bounded_from(dtype)`.

    Raises ConfigError for values outside these sets. Which combinations an operator has kernels
    for is its spec's to say.
    """

    op: str
    dtype: str
    arch: str
    head_size: int = 0
    chunk_length: int = 0
    decay: str = "loglog"
    state_dtype: str = "fp32"
    state_layout: str = "vk"
    checkpoint_dtype: str = "auto"
    precision: str = "float32"
    bounded: bool = False

    def __post_init__(self) -> None:
        _choose(self.op, "dtype", self.dtype, DTYPES)
        _choose(self.op, "decay", self.decay, DECAYS)
        _choose(self.op, "state_dtype", self.state_dtype, DTYPES)
        _choose(self.op, "state_layout", self.state_layout, STATE_LAYOUTS)
        _choose(self.op, "checkpoint_dtype", self.checkpoint_dtype, CHECKPOINT_DTYPES)
        _choose(self.op, "precision", self.precision, PRECISIONS)
        for name, value in (("head_size", self.head_size), ("chunk_length", self.chunk_length)):
            if type(value) is not int or not 0 <= value <= MAX_HEAD_SIZE:
                raise not_a_size(self.op, name, value)
        if parse_arch(self.arch) != self.arch:
            raise ConfigError(f"{self.op}: arch={self.arch!r} must be in slug form, e.g. sm90a")

    @property
    def slug(self) -> str:
        """The configuration as a C identifier, e.g. `wkv7_n64_bf16_l16_sm90a`; without heads and
        chunks `a_gate_bf16_sm90a`. What differs from the default decay, state dtype, state layout,
        checkpoint dtype and precision follows the architecture, and last that decays are
        bounded."""
        parts = [
            self.op,
            f"_n{self.head_size}" if self.head_size else "",
            f"_{self.dtype}",
            f"_l{self.chunk_length}" if self.chunk_length else "",
            f"_{self.arch}",
            "" if self.decay == "loglog" else f"_{self.decay}",
            "" if self.state_dtype == default_state_dtype(self.dtype) else f"_s{self.state_dtype}",
            "" if self.state_layout == "vk" else f"_{self.state_layout}",
            "" if self.checkpoint_dtype == "auto" else f"_c{self.checkpoint_dtype}",
            "" if self.precision == "float32" else f"_{self.precision}",
            "_bounded" if self.bounded else "",
        ]
        return "".join(parts)

    @property
    def decays_are_bounded(self) -> bool:
        """Whether they are, be it declared or by what w means."""
        return self.bounded or self.decay == "logit"

    @property
    def rounded_to(self) -> str:
        """What operands of products may be rounded to: "tf32" or the dtype."""
        return self.dtype if self.precision == "float32" else self.precision

    @classmethod
    def parse(cls, slug: str) -> OpConfig:
        """The configuration that `slug` names. Raises ConfigError if it names none."""
        match = _SLUG.fullmatch(slug)
        if match is None:
            raise ConfigError(
                f"{slug!r} is not a configuration; write one as wkv7_n64_bf16_l16_sm90a"
            )
        return cls(
            op=match["op"],
            head_size=int(match["head_size"] or 0),
            dtype=match["dtype"],
            chunk_length=int(match["chunk_length"] or 0),
            arch=match["arch"],
            decay=match["decay"] or "loglog",
            state_dtype=match["state_dtype"] or default_state_dtype(match["dtype"]),
            state_layout="kv" if match["layout"] else "vk",
            checkpoint_dtype=match["checkpoint_dtype"] or "auto",
            precision=match["precision"] or "float32",
            bounded=match["bounded"] is not None,
        )


def bounded_from(dtype: str) -> float:
    """The least bound on log d that makes a difference to kernels of `dtype`."""
    return _BOUNDED_FROM.get(dtype, _BOUNDED_FROM_ELSE)


def is_bounded(op: str, dtype: str, lower_bound: float | None) -> bool:
    """Whether a declared bound on log d makes a difference to kernels; None is no declaration.

    Raises ConfigError for what cannot be a bound.
    """
    if lower_bound is None:
        return False
    number = type(lower_bound) in (int, float) and not math.isnan(lower_bound)
    if not number or lower_bound > 0:
        raise ConfigError(
            f"{op}: lower_bound={lower_bound!r} must be a number of at most 0, that below which "
            "the logarithm of no token's decay factor lies, as -0.61; leave it out if there is none"
        )
    return lower_bound >= bounded_from(dtype)


def not_a_size(op: str, name: str, value: object) -> ConfigError:
    """The refusal of a head size or chunk length."""
    return ConfigError(f"{op}: {name}={value!r} must be a whole number from 1 to {MAX_HEAD_SIZE}")


def _choose(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{op}: {name}={value!r} is not known; choose from {', '.join(choices)}")
