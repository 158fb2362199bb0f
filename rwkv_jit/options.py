"""Options that the commands share, and lists in options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer

from .errors import ConfigError

_Value = TypeVar("_Value")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
OpsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="OP", help="Operators; all if none is named.")
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
