"""FLA's RWKV-6 and RWKV-7 models with our kernels registered.

FLA's own kernels are the oracle here; without a GPU, in Triton's interpreter. Models have random
weights. Relative RMS errors are asserted: 1e-5 for logits in float32 and 1e-4 for the gradient of
every parameter, on a GPU 2e-3 and 8e-3: FLA's kernels multiply in TF32 there, and FLA's tests allow
them 4e-3 to 8e-3.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from running import environment

# Importing it is left to the program.
for name in ("flash-linear-attention", "triton"):
    if not any(importlib.metadata.Distribution.discover(name=name)):
        pytest.skip(f"{name} is not installed", allow_module_level=True)

PROGRAM = Path(__file__).parent / "fla_program.py"
LIMITS = {"cpu": {"logits": 1e-5, "gradients": 1e-4}, "cuda": {"logits": 2e-3, "gradients": 8e-3}}
RUNS = (
    "RWKV6 trained",
    "RWKV6 trained in chunks",
    "RWKV6 served",
    "RWKV6, K < V trained",
    "RWKV6, K < V served",
    "RWKV7 trained",
    "RWKV7 served",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def report(device: str, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the program says. A process of its own: Triton reads its settings when imported."""
    variables = environment(session_cache)
    # FLA may have been found there.
    variables["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    variables["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    if device == "cpu":
        variables.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), device],
        env=variables, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", RUNS)
def test_logits_and_gradients_match_its_own_kernels(run: str, device: str, report: Any) -> None:
    for kind, error in report["errors"][run].items():
        assert 0 < error <= LIMITS[device][kind], kind


def test_our_kernels_ran(report: Any) -> None:
    ran = [name.partition("_")[0] + name[name.rindex(".") :] for name in report["kernels"]]
    assert ran == ["wkv6.backward", "wkv6.forward", "wkv7.backward", "wkv7.forward"]


def test_signatures_begin_as_its_own(report: Any) -> None:
    assert len(report["signatures"]) == 6
    for name, (theirs, mine) in report["signatures"].items():
        assert mine[: len(theirs)] == theirs, name
