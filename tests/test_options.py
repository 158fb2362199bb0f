"""Lists in options: each value once, and wrong usage where one has no meaning."""

from __future__ import annotations

import pytest
import typer

from rwkv_jit.arch import parse_arch
from rwkv_jit.errors import ConfigError
from rwkv_jit.options import one_of, split_list, whole_number


@pytest.mark.parametrize(
    ("text", "values"), [("64,128", (64, 128)), (" 64 , 64,", (64,)), ("", ()), (",", ())]
)
def test_a_list_holds_each_value_once_in_order(text: str, values: tuple[int, ...]) -> None:
    assert split_list(text, "--head-size", whole_number) == values


@pytest.mark.parametrize("text", ["x", "-1", "64,1.5", "6 4"])
def test_what_is_no_number_is_wrong_usage_of_the_option(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a whole number") as caught:
        split_list(text, "--head-size", whole_number)
    assert caught.value.param_hint == "--head-size"


def test_an_unknown_name_is_wrong_usage_with_the_choices() -> None:
    with pytest.raises(typer.BadParameter, match="'bf17' is not one of bf16, fp32"):
        split_list("bf16,bf17", "--dtype", one_of(("bf16", "fp32")))


def test_errors_of_the_package_pass() -> None:
    with pytest.raises(ConfigError, match="is not an architecture"):
        split_list("9.0a,huge", "--arch", parse_arch)
