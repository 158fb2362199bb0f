"""The program as its users meet it: output, exit codes, and JSON alone where it is asked for."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_entries import LOG, add_entry
from rwkv_jit import __version__, doctor, warming
from rwkv_jit.cli import app
from rwkv_jit.config import OpConfig
from rwkv_jit.doctor import Check
from rwkv_jit.ops import SPECS, get_spec
from rwkv_jit.render import render
from rwkv_jit.settings import current_settings

ROOT = Path(__file__).parent.parent
SLUG = "wkv7_n64_bf16_l16_sm90a"
SMALL = ("warm", "wkv7", "--arch", "cpu", "--head-size", "8", "--entry", "forward")
COMMANDS = (
    (),
    ("warm",),
    ("list",),
    ("render",),
    ("show",),
    ("doctor",),
    ("cache",),
    ("cache", "path"),
    ("cache", "ls"),
    ("cache", "clear"),
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache that only this test uses; settings are read once in a process."""
    root = tmp_path / "cache"
    monkeypatch.setenv("RWKV_JIT_CACHE_DIR", str(root))
    current_settings.cache_clear()
    yield root
    current_settings.cache_clear()


def run(*arguments: str, code: int = 0) -> Any:
    """Run the program in this process, which must end with `code` and without a traceback."""
    result = CliRunner().invoke(app, arguments, prog_name="rwkv-jit")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: str, code: int = 0) -> Any:
    """What a command prints with --json, which must be JSON alone."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def program(*arguments: str) -> list[str]:
    """The command line of the program in a process of its own."""
    return [sys.executable, "-m", "rwkv_jit", *arguments]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RWKV_JIT_CACHE_DIR": str(cache)}


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


def test_every_command_takes_json() -> None:
    for command in COMMANDS:
        if command not in {(), ("cache",)}:
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


def test_warm_builds_and_then_finds() -> None:
    (first,) = run_json(*SMALL)
    assert first["status"] in ("built", "hit")
    assert Path(first["library"]).is_file()
    (second,) = run_json(*SMALL)
    assert second == {**first, "status": "hit"}
    (planned,) = run_json(*SMALL, "--dry-run")
    assert planned == second
    lines = run(*SMALL).stdout.splitlines()
    assert lines[0].split() == ["kernel", "status", "seconds", "registers", "spill", "bytes"]
    assert lines[1].split() == [first["kernel"], "hit", "-", "-", "-"]
    assert lines[2] == "1 hit"
    listed = run_json("cache", "ls")["entries"]
    assert first["digest"] in {entry["digest"] for entry in listed}
    (shown,) = run_json("show", first["kernel"])
    assert shown["digest"] == first["digest"]


def test_force_plans_what_exists_too() -> None:
    run(*SMALL)
    (planned,) = run_json(*SMALL, "--dry-run", "--force")
    assert planned["status"] == "missing"


def test_a_dry_run_touches_nothing(own_cache: Path) -> None:
    result = run("warm", "wkv7", "--arch", "9.0a,cpu", "--dry-run")
    assert "4 missing" in result.stdout
    assert not own_cache.exists()


def test_one_bad_combination_stops_all_before_anything_is_built(own_cache: Path) -> None:
    run("warm", "wkv7", "--arch", "cpu,9.0a", "--head-size", "8,65", code=1)
    assert not own_cache.exists()


def test_warm_without_a_compiler_fails_with_one_message(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    current_settings.cache_clear()
    result = run("warm", "wkv7", "--arch", "cpu", code=1)
    assert result.stderr.count("CXX='no-such-compiler' is not a program") == 1
    assert "2 failed" in result.stdout
    outcomes = run_json("warm", "wkv7", "--arch", "cpu", code=1)
    assert [outcome["status"] for outcome in outcomes] == ["failed", "failed"]
    assert "no-such-compiler" in outcomes[0]["error"]


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_choices: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warming, "plan", interrupt)
    assert run(*SMALL, code=130).stderr == "interrupted\n"


def test_an_interrupted_build_leaves_nothing_half_made(tmp_path: Path) -> None:
    process = subprocess.Popen(
        program(*SMALL), env=environment(tmp_path / "cache"), stderr=subprocess.PIPE, text=True
    )
    staging = tmp_path / "cache" / "v1" / "staging"
    deadline = time.monotonic() + 60
    while not list(staging.glob("*/build.log")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("interrupted\n")
    assert list(staging.iterdir()) == []
    assert list((tmp_path / "cache" / "v1" / "entries").iterdir()) == []


def test_list_shows_each_operator_from_its_spec() -> None:
    text = run("list").stdout
    for spec in SPECS.values():
        assert spec.formula in text
    assert [operator["name"] for operator in run_json("list")] == list(SPECS)
    (operator,) = run_json("list", "wkv7")
    inputs = operator["entries"]["forward"]["inputs"]
    assert inputs[0] == {
        "name": "r",
        "shape": ["B", "T", "H", "N"],
        "dtype": ["op"],
        "optional": False,
        "saved": False,
        "meaning": "receptance",
    }


def test_render_prints_the_source_alone() -> None:
    spec, config = get_spec("wkv7"), OpConfig.parse(SLUG)
    assert run("render", SLUG).stdout == render(spec, config, "forward").text
    backward = render(spec, config, "backward")
    assert run("render", SLUG, "--entry", "backward").stdout == backward.text
    assert run_json("render", f"{SLUG}.backward") == {
        "kernel": f"{SLUG}.backward",
        "suffix": ".cu",
        "source": backward.text,
    }


def test_show_tells_facts_resources_and_the_end_of_the_log(own_cache: Path) -> None:
    entry = add_entry(own_cache, f"{SLUG}.forward")
    for name in (SLUG, f"{SLUG}.forward", entry.manifest.digest[:8]):
        text = run("show", name).stdout
        assert f"log       {entry.log}\n" in text
        assert "forward_kernel" in text
        assert "line 40" in text
        assert "line 5\n" not in text
    (data,) = run_json("show", SLUG)
    assert (data["registers"], data["spill_bytes"]) == (80, 12)
    assert "log_text" not in data


def test_show_prints_the_whole_log_or_the_source(own_cache: Path) -> None:
    add_entry(own_cache, f"{SLUG}.forward")
    assert run("show", SLUG, "--log").stdout.strip() == LOG.strip()
    assert run("show", SLUG, "--source").stdout.strip() == f"// source of {SLUG}.forward"
    (data,) = run_json("show", SLUG, "--log", "--source")
    assert data["log_text"] == LOG
    add_entry(own_cache, f"{SLUG}.backward")
    text = run("show", SLUG, "--source").stdout
    assert f"==> source of {SLUG}.backward <==\n// source of {SLUG}.backward\n" in text


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_doctor_ends_with_1_only_for_an_error(
    monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    checks = [Check(name="disk", status=status, value="full", fix="buy one")]
    monkeypatch.setattr(doctor, "examine", lambda **_: checks)
    text = run("doctor", code=code).stdout
    assert f"{status}: disk: buy one" in text
    assert run_json("doctor", code=code) == [
        {"name": "disk", "status": status, "value": "full", "fix": "buy one"}
    ]


def test_cache_path_is_that_of_the_settings(own_cache: Path) -> None:
    assert run("cache", "path").stdout == f"{own_cache}\n"
    assert run_json("cache", "path") == {"path": str(own_cache)}
    assert not own_cache.exists()


def test_cache_ls_lists_kernels_and_their_total(own_cache: Path) -> None:
    assert run("cache", "ls").stdout == f"0 kernels, 0 B in {own_cache}\n"
    for entry in ("forward", "backward"):
        add_entry(own_cache, f"{SLUG}.{entry}")
    lines = run("cache", "ls").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [f"{SLUG}.backward", f"{SLUG}.forward"]
    assert lines[-1].startswith("2 kernels, ")
    data = run_json("cache", "ls")
    assert data["bytes"] == sum(entry["bytes"] for entry in data["entries"])


def test_cache_clear_removes_without_asking_where_nobody_can_answer(own_cache: Path) -> None:
    entry = add_entry(own_cache, f"{SLUG}.forward")
    planned = run_json("cache", "clear", "--dry-run")
    assert [item["path"] for item in planned["removed"]] == [str(entry.path)]
    assert entry.path.exists()
    assert str(entry.path) in run("cache", "clear", "--dry-run").stdout
    assert run("cache", "clear").stdout.startswith("removed 1 item, ")
    assert not entry.path.exists()
    assert run_json("cache", "clear") == {"dry_run": False, "removed": []}


@pytest.mark.parametrize(
    ("options", "answer", "kept"),
    [((), b"n\n", True), ((), b"y\n", False), (("--yes",), b"", False)],
)
def test_cache_clear_asks_on_a_terminal(
    tmp_path: Path, options: tuple[str, ...], answer: bytes, kept: bool
) -> None:
    entry = add_entry(tmp_path, f"{SLUG}.forward")
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            program("cache", "clear", *options),
            stdin=theirs,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert ("Remove 1 item" in done.stderr) == (answer != b"")
    assert done.returncode == (1 if kept else 0)
    assert entry.path.exists() == kept
