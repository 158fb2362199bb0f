"""What the documentation names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from rwkv_jit.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").iterdir())]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def text(request: pytest.FixtureRequest) -> str:
    return str(request.param.read_text(encoding="utf-8"))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each call of the program, to the end of its line."""
    joined = text.replace("\\\n", " ")
    for match in re.finditer(r"\brwkv-jit ([a-z][^\n`|;#]*)", joined):
        yield match[1].partition(" && ")[0].split()


def test_every_setting_exists(text: str) -> None:
    # RWKV_JIT_ON is RWKV-LM's, for TorchScript.
    known = (ROOT / "rwkv_jit" / "settings.py").read_text() + '"RWKV_JIT_ON"'
    for name in re.findall(r"\bRWKV_JIT_[A-Z_]+\b", text):
        assert f'"{name}"' in known, name


def test_every_command_and_option_exists(text: str) -> None:
    for words in commands(text):
        command = get_command(app)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not get_command(app), words
        options = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= options | {"--help"}, (command.name, used - options)


def test_every_link_leads_to_a_file() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), (document.name, target)
