"""What the commands print and do, with JSON alone where it is asked for."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer

from cache_entries import LOG, add_entry
from locking import lock_held_elsewhere
from running import environment, program, run, run_json
from rwkv_jit.arch import host_cpu_arch, parse_arch
from rwkv_jit.cache import cache_key
from rwkv_jit.cli import doctor, planning
from rwkv_jit.cli.options import one_of, split_list, whole_number
from rwkv_jit.cli.toolchain_checks import Check
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import ConfigError
from rwkv_jit.ops import SPECS, get_spec
from rwkv_jit.render import render
from rwkv_jit.settings import current_settings
from rwkv_jit.toolchain import find_toolchain
from stuck_compiler import StuckCompiler

SLUG = "wkv7_n64_bf16_l16_sm90a"
SMALL = ("warm", "wkv7", "--arch", "cpu", "--head-size", "8", "--entry", "forward")


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


def test_a_lower_bound_chooses_the_kernels_that_make_use_of_it() -> None:
    planned = run_json(
        "warm", "wkv7", "--arch", "9.0a,cpu", "--dtype", "bf16", "--entry", "forward",
        "--lower-bound", "-0.61", "--dry-run",
    )  # fmt: skip
    assert {outcome["kernel"] for outcome in planned} == {
        f"{SLUG}_bounded.forward",
        f"wkv7_n64_bf16_l16_{host_cpu_arch()}.forward",
    }


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

    monkeypatch.setattr(planning, "plan", interrupt)
    assert run(*SMALL, code=130).stderr == "interrupted\n"


def test_an_interrupted_build_leaves_nothing_half_made(tmp_path: Path) -> None:
    compiler = StuckCompiler(tmp_path)
    variables = {**environment(tmp_path / "cache"), "CXX": str(compiler.program)}
    process = subprocess.Popen(program(*SMALL), env=variables, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not compiler.is_compiling():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("interrupted\n")
    assert compiler.is_gone()
    assert list((tmp_path / "cache" / "v1" / "staging").iterdir()) == []
    assert list((tmp_path / "cache" / "v1" / "entries").iterdir()) == []


def test_a_wait_for_another_process_is_told_above_the_bar_and_can_be_interrupted(
    tmp_path: Path,
) -> None:
    config = OpConfig.parse(f"wkv7_n8_fp32_l16_{host_cpu_arch()}")
    source = render(get_spec("wkv7"), config, "forward")
    digest = cache_key(source, find_toolchain(config.arch, current_settings())).digest
    ours, theirs = pty.openpty()
    variables = {**environment(tmp_path), "RWKV_JIT_LOG_LEVEL": "info", "TERM": "xterm"}
    said = b""
    with (
        lock_held_elsewhere(tmp_path, digest) as holder,
        subprocess.Popen(
            program(*SMALL), env=variables, stdout=subprocess.DEVNULL, stderr=theirs
        ) as process,
    ):
        os.close(theirs)
        try:
            deadline = time.monotonic() + 60
            while f" s for process {holder} on ".encode() not in said:
                assert time.monotonic() < deadline
                said += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            # Until the process is gone, which reading tells as an error.
            with contextlib.suppress(OSError):
                while True:
                    said += os.read(ours, 4096)
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()
            os.close(ours)
    assert said.rstrip().endswith(b"interrupted")
    assert b"rwkv_jit: building" not in said


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
        "mutated": False,
        "saved": False,
        "meaning": "receptance",
    }


def test_a_serving_operator_is_listed_and_rendered_as_any_other() -> None:
    assert "in place" in run("list", "wkv7_decode").stdout
    slug = "wkv7_decode_n64_bf16_l16_sm90a"
    source = render(get_spec("wkv7_decode"), OpConfig.parse(slug), "decode")
    assert run("render", slug).stdout == source.text


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
