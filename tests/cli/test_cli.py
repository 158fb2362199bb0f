"""The program as its users meet it: help, exit codes, and one message for an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from running import environment, program, run
from rwkv_jit import __version__
from rwkv_jit.cli import app
from rwkv_jit.settings import current_settings

SLUG = "wkv7_n64_bf16_l16_sm90a"
COMMANDS = (
    (),
    ("warm",),
    ("list",),
    ("render",),
    ("show",),
    ("doctor",),
    ("bench",),
    ("run",),
    ("cache",),
    ("cache", "path"),
    ("cache", "ls"),
    ("cache", "clear"),
)


def test_help_of_every_command_answers_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from typer.testing import CliRunner
from rwkv_jit.cli import app
for line in sys.stdin.read().splitlines():
    result = CliRunner().invoke(app, [*line.split(), "--help"], prog_name="rwkv-jit")
    assert result.exit_code == 0, result.output
    assert f"Usage: rwkv-jit {line}".strip() in result.output, result.output
assert not {"torch", "jinja2", "filelock"} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(" ".join(command) for command in COMMANDS),
        env=environment(tmp_path / "cache"),
        text=True,
        check=True,
    )
    assert not (tmp_path / "cache").exists()


def test_every_option_is_declared_in_small_letters() -> None:
    # typer 0.27 takes a metavar that is the option's name for the option's declaration.
    options = [
        (parameter.name, parameter.metavar)
        for command in _commands(typer.main.get_command(app))
        for parameter in command.params
        if parameter.param_type_name == "option"
    ]
    assert len(options) > 50
    assert [name for name, metavar in options if metavar == str(name).upper()] == []


def _commands(command: Any) -> Iterator[Any]:
    yield command
    for other in getattr(command, "commands", {}).values():
        yield from _commands(other)


def test_every_command_but_run_takes_json() -> None:
    for command in COMMANDS:
        if command not in {(), ("cache",), ("run",)}:
            assert "--json" in run(*command, "--help").output


def test_the_module_is_the_program(tmp_path: Path) -> None:
    done = subprocess.run(
        program("--version"),
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"rwkv-jit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sing",), "sing"),
        (("warm", "--head-size", "x"), "'x' is not a whole number"),
        (("warm", "--dtype", "bf17"), "'bf17' is not one of bf16"),
        (("warm", "--jobs", "0"), "--jobs"),
        (("render",), "SLUG"),
        (("render", SLUG, "--entry", ""), "is not one of forward, backward"),
        (("cache", "clear", "--maybe"), "--maybe"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments, code=2)
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("warm", "wkv9", "--arch", "cpu"), "operator 'wkv9' does not exist; choose from"),
        (("warm", "wkv7", "--arch", "9.0a", "--head-size", "65"), "head_size=65 is not supported"),
        (("warm", "--arch", "huge"), "arch='huge' is not an architecture"),
        (("list", "wkv9"), "operator 'wkv9' does not exist"),
        (("render", "nonsense"), "'nonsense' is not a configuration"),
        (("show", SLUG), "Build it with: rwkv-jit warm wkv7 --head-size 64 --dtype bf16"),
        (("show", "abcdef"), "no kernel in the cache has a digest that begins with abcdef"),
    ],
)
def test_errors_end_with_1_and_one_message(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments, code=1)
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stdout == ""


def test_a_setting_without_meaning_is_an_error(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_JIT_MODE", "sometimes")
    current_settings.cache_clear()
    assert "RWKV_JIT_MODE='sometimes' is not known" in run("cache", "ls", code=1).stderr
