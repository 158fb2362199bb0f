"""`rwkv-jit bench`: tables and JSON, plots, exit codes, and one message for wrong usage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from running import ROOT, environment, run, run_json
from rwkv_jit.bench import plot
from rwkv_jit.bench.cases import Case
from rwkv_jit.bench.contenders import OURS, Contender
from rwkv_jit.bench.inputs import Tensors
from rwkv_jit.bench.timing import copy_bandwidth
from rwkv_jit.errors import BenchError

QUICK = ("bench", "--op", "wkv7", "--shape", "1,20,2,8", "--seconds", "0", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a few bytes: what it measures is not looked at here."""
    monkeypatch.setattr("rwkv_jit.bench.timing._COPIED_FLOATS", {"cpu": 1 << 10, "cuda": 1 << 10})
    assert copy_bandwidth("cpu", 0.0) > 0


def test_the_table_names_the_kernels_and_compares_with_the_loop() -> None:
    lines = run(*QUICK).stdout.splitlines()
    at = lines.index("wkv7 (1, 20, 2, 8) fp32")
    assert lines[at + 1].split()[:4] == ["by", "status", "pass", "kernel"]
    assert lines[at + 2].split()[:4] == ["rwkv_jit", "ok", "forward", "wkv7_forward.cpp"]
    assert lines[at + 3].split()[:4] == ["forward", "+", "backward", "wkv7_backward.cpp"]
    assert lines[at + 4].split()[:2] == ["loop", "ok"]


def test_a_case_is_told_that_decays_are_bounded() -> None:
    assert "wkv7 (1, 20, 2, 8) fp32 bounded" in run(*QUICK, "--lower-bound", "-0.61").stdout
    (ours, _) = run_json(*QUICK, "--lower-bound=-11")["results"]
    assert not ours["bounded"]
    refused = run(*QUICK, "--lower-bound", "1", code=1)
    assert "bench: lower_bound=1.0 must be a number of at most 0" in refused.stderr


def test_a_serving_operator_has_a_step_and_no_gradients() -> None:
    arguments = ("bench", "--op", "wkv6_decode", "--shape", "3,2,2,8", "--seconds", "0")
    quick = (*arguments, "--device", "cpu")
    lines = run(*quick).stdout.splitlines()
    at = lines.index("wkv6_decode (3, 2, 2, 8) fp32")
    assert lines[at + 2].split()[:4] == ["rwkv_jit", "ok", "step", "wkv6_decode.cpp"]
    (result,) = run_json(*quick, "--state-dtype", "bf16")["results"]
    assert (result["status"], result["state_dtype"]) == ("ok", "bf16")
    assert set(result["passes"]) == {"decode"}
    assert result["limit"] == 1.2e-2
    assert 1e-4 < result["error"] < 1.2e-2


def test_json_says_what_was_measured_where_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/rwkv-jit", "bench", "--op", "a b"])
    data = run_json(*QUICK, "--shape", "1,21,2,8", "--dtype", "fp32")
    assert {"device", "arch", "torch", "cuda", "driver", "nvcc", "host_compiler"} < set(data)
    assert data["command"] == "rwkv-jit bench --op 'a b'"
    assert data["copy_bytes_per_second"] > 0
    found = [(result["shape"], result["by"], result["status"]) for result in data["results"]]
    assert found == [
        ([1, length, 2, 8], by, "ok") for length in (20, 21) for by in ("rwkv_jit", "loop")
    ]


def test_peers_that_are_missing_or_wrong_are_rows_and_no_failure(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("decay = 'log'\ndef call(r, w, k, v, a, b): return r + w + k + v + a + b")
    result = run(*QUICK, "--peers", "--rwkv-lm", str(wrong))
    assert "fla missing: runs on a GPU only" in result.stdout
    assert "wrong failed: error " in result.stdout


def test_a_failed_gate_of_ours_is_shown_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, device: str, **_: object) -> list[Contender]:
        from rwkv_jit.bench.contenders import ours

        right = ours(case, device)

        def call(tensors: Tensors) -> object:
            return [2 * y for y in right.call(tensors)]

        return [Contender(name=OURS, call=call, config=right.config, limit=right.limit)]

    monkeypatch.setattr("rwkv_jit.bench.contenders.line_up", wrong)
    result = run(*QUICK, code=1)
    assert "rwkv_jit failed: error 1.0e+00 of" in result.stdout
    (told,) = run_json(*QUICK, code=1)["results"]
    assert (told["status"], told["passes"]) == ("failed", {})


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml")], ids=["png", "svg"]
)
def test_a_plot_is_written(tmp_path: Path, suffix: str, begin: bytes) -> None:
    path = tmp_path / f"times{suffix}"
    data = run_json(*QUICK, "--plot", str(path))
    assert path.read_bytes().startswith(begin)
    lengths = {tuple(result["shape"][1:3]) for result in data["results"]}
    assert lengths == {(1, 2), (2, 2), (5, 2), (10, 2), (20, 2), (20, 1)}


def test_a_missing_matplotlib_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise BenchError("plots need matplotlib")

    monkeypatch.setattr(plot, "check_plotting", missing)
    result = run(*QUICK, "--plot", str(tmp_path / "times.png"), code=1)
    assert result.stderr == "error: plots need matplotlib\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "wkv9"), "operator 'wkv9' does not exist; choose from"),
        (("--shape", "8,64"), "'8,64' is not four whole numbers"),
        (("--shape", "1,64,2,65", "--device", "cpu"), "head_size=65 is not supported"),
        (("--dtype", "bf17"), "'bf17' is not one of bf16"),
        (("--device", "tpu"), "'tpu' is not one of cpu, cuda"),
        (("--plot", "times.pdf"), "'.pdf' is not one of .png, .svg"),
        (("--state-dtype", "fp8"), "'fp8' is not one of bf16"),
        (("--plot", "t.png", "--op", "wkv7_decode"), "wkv7_decode has no plot"),
        (("--plot", "times"), "'no suffix' is not one of .png, .svg"),
        (("--plot", "nowhere/times.png"), "nowhere is not a folder"),
        (("--plot", "t.png", "--shape", "1,8,1,8", "--shape", "1,9,1,8"), "one largest shape"),
        (("--rwkv-lm", "nowhere.py"), "nowhere.py"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(arguments: tuple[str, ...], said: str) -> None:
    result = run("bench", *arguments, code=2)
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


@pytest.mark.gpu
def test_a_gpu_reports_memory_and_no_loop() -> None:
    quick = ("bench", "--op", "wkv7", "--shape", "2,64,2,64", "--seconds", "0", "--device", "cuda")
    (result,) = run_json(*quick, "--dtype", "bf16")["results"]
    assert result["status"] == "ok"
    # y and six gradients at least.
    assert result["extra_bytes"] >= 7 * 2 * 64 * 2 * 64 * 2
    assert result["passes"]["both"]["times_loop"] is None


def test_the_program_of_the_checkout_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), "--shape", "1"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "rwkv-jit bench" in done.stderr
