"""What several commands have: options, and the reading of lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..config import DECAYS, DTYPES, ENTRIES, PRECISIONS
from ..errors import ConfigError

_Value = TypeVar("_Value")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
OpsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="OP", help="Operators; all if none is named.")
]
HeadSizeOption = Annotated[str, typer.Option(help="Head sizes, as 64,128.", metavar="LIST")]
DtypeOption = Annotated[
    str,
    typer.Option(
        help=f"Of {', '.join(DTYPES)}. Default: bf16 for CUDA, fp32 for a CPU.", metavar="LIST"
    ),
]
ArchOption = Annotated[
    str,
    typer.Option(
        help="As 8.0,9.0a,12.0f,cpu. Default: RWKV_JIT_CUDA_ARCH_LIST, else TORCH_CUDA_ARCH_LIST, "
        "else the GPUs at hand, else this CPU.",
        metavar="LIST",
    ),
]
DecayOption = Annotated[
    str, typer.Option(help=f"What w means, of {', '.join(DECAYS)}.", metavar="LIST")
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="What kernels of fp32 may round operands of products to, where there are such: one of "
        f"{', '.join(PRECISIONS)}.",
        metavar="DTYPE",
    ),
]
LowerBoundOption = Annotated[
    float | None,
    typer.Option(
        help="What log d is at least, for every token; from -8 on tensor-core kernels are faster.",
        metavar="LOG_D",
    ),
]
EntryOption = Annotated[
    str, typer.Option(help=f"Of {', '.join(ENTRIES)}. Default: all.", metavar="LIST")
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most compilers at once. Default: MAX_JOBS, else what cores and memory allow."
    ),
]
FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="The kernels that rwkv_jit.used_configs(FILE) wrote, and no others; with --arch, for "
        "these architectures.",
        metavar="FILE",
    ),
]


def split_list(text: str, option: str, convert: Callable[[str], _Value]) -> tuple[_Value, ...]:
    """The values of a comma-separated list, each once. ValueErrors of `convert` end the program as
    wrong usage; ConfigErrors pass."""
    try:
        values = [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ConfigError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    return tuple(dict.fromkeys(values))


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A conversion for `split_list`: a value that must be one of these."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check


def whole_number(text: str) -> int:
    """A conversion for `split_list`: digits only."""
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)
