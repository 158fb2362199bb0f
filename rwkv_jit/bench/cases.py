"""Cases: what a run of the benchmark measures, as plain values. Needs no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

# By the entry that is called.
_SHAPES = {
    "forward": {
        "cuda": ("8,4096,64,64", "8,4096,32,128", "1,8192,32,64", "4,1024,16,64"),
        "cpu": ("1,1024,12,64",),
    },
    # T is what is decoded at once.
    "decode": {
        "cuda": ("1,1,32,64", "32,1,32,64", "256,1,32,64", "1024,1,32,64"),
        "cpu": ("16,1,12,64",),
    },
    "prefill": {"cuda": ("1,8192,32,64", "64,1875,32,64"), "cpu": ("4,256,12,64",)},
}
_DTYPES = {"cuda": ("bf16", "fp32"), "cpu": ("fp32",)}
# The largest length and number of heads of a plot.
_CORNERS = {"cuda": "8,8192,64,64", "cpu": "1,512,8,64"}
_HALVINGS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """B, T, H and N of an operator's tokens."""

    batch: int
    length: int
    heads: int
    head_size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A shape from "B,T,H,N". Raises ValueError if it is anything else."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"{text!r} is not four whole numbers above 0, as 8,4096,64,64")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.batch},{self.length},{self.heads},{self.head_size}"

    @property
    def sequences_and_heads(self) -> int:
        """B * H, what runs in parallel whatever the kernel."""
        return self.batch * self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator, shape and dtype. state_dtype: where it is not the dtype's own. precision: what
    it is asked for. bounded: whether it is told that decays are. packed: whether the B sequences
    have the lengths of `lengths_in`."""

    op: str
    shape: Shape
    dtype: str
    state_dtype: str = ""
    precision: str = "float32"
    bounded: bool = False
    packed: bool = False

    def __str__(self) -> str:
        states = f", states in {self.state_dtype}" if self.state_dtype else ""
        told = (
            ("" if self.precision == "float32" else f" {self.precision}")
            + (" bounded" if self.bounded else "")
            + (" packed" if self.packed else "")
        )
        return f"{self.op} ({str(self.shape).replace(',', ', ')}) {self.dtype}{told}{states}"


def default_shapes(device: str, entry: str = "forward") -> list[Shape]:
    """What is measured of an operator, by the entry that is called, where no shape is named."""
    return [Shape.parse(text) for text in _SHAPES[entry][device]]


def lengths_in(shape: Shape) -> list[int]:
    """B lengths from 17 or less to more than twice T, as prompts have them, in no order; in all
    B * T tokens."""
    count, total = shape.batch, shape.batch * shape.length
    least = min(17, shape.length)
    longest = shape.length * 32 / 15
    # A power of numbers from 0 to 1 whose mean is that of the lengths.
    power = (longest - shape.length) / max(shape.length - least, 1)
    rising = [
        round(least + (longest - least) * (i / max(count - 1, 1)) ** power) for i in range(count)
    ]
    rising[count // 2] += total - sum(rising)
    random.Random(0).shuffle(rising)
    return rising


def default_dtypes(device: str) -> tuple[str, ...]:
    """The dtypes where none is named."""
    return _DTYPES[device]


def default_corner(device: str) -> Shape:
    """The largest shape of a plot where none is named."""
    return Shape.parse(_CORNERS[device])


def lengths_of(corner: Shape) -> list[Shape]:
    """Shapes of one B * H, T rising to that of `corner`."""
    return [replace(corner, length=length) for length in _halves(corner.length)]


def heads_of(corner: Shape) -> list[Shape]:
    """Shapes of one T, B * H rising to that of `corner`."""
    return [replace(corner, heads=heads) for heads in _halves(corner.heads)]


def sweep(corner: Shape) -> list[Shape]:
    """Both, each shape once."""
    return list(dict.fromkeys((*lengths_of(corner), *heads_of(corner))))


def _halves(largest: int) -> list[int]:
    values = {largest >> halvings for halvings in range(_HALVINGS + 1)}
    return sorted(values - {0})
