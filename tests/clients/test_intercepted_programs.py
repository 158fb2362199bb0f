"""Programs that build kernels of their own, run by `rwkv-jit run` with no changed line.

Each has a way without its kernels, in plain PyTorch, which is the oracle. Relative RMS errors are
asserted: for logits and states in float32 1e-5; for a float32 model with a bfloat16 kernel 2e-3 for
gradients and every loss of a short training; for a model in bfloat16 2e-2, and for one whose every
step is another extension, against the same in float32, 5e-2 for gradients and 2e-3 for losses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from comparing import relative_rms
from running import ROOT, program
from rwkv_checkpoints import LAYERS, write_checkpoint

FLOAT32, KERNEL_BFLOAT16, MODEL_BFLOAT16 = 1e-5, 2e-3, 2e-2
BLOCK_BFLOAT16 = 5e-2
TRAINING = Path(__file__).parent / "rwkv_lm_training.py"
BLOCK_TRAINING = Path(__file__).parent / "rwkv_lm_block_training.py"
GENERATION = """
import sys
import torch
from rwkv.model import RWKV

torch.manual_seed(0)
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
if "--its-gpu-path" in sys.argv:
    # On a CPU the package itself takes its loops for RWKV-5 and RWKV-6.
    for version in ("5_2", "6_0"):
        setattr(model, f"att_seq_v{version}", getattr(model, f"cuda_att_seq_v{version}"))
results, state = [], None
for ids in (list(range(37)), [5, 6], [7]):
    logits, state = model.forward(ids, state, full_output=True)
    results += [logits.clone(), *(x.clone() for x in state)]
torch.save(results, sys.argv[2])
if "rwkv_jit" in sys.modules:
    print(*sys.modules["rwkv_jit"].used_configs())
"""

TRAINING_BY_A_PACKAGE = """
import os
import sys
import types
import torch
from rwkv_trainer.model import model as package

if "--ours" in sys.argv:
    from rwkv_jit.compat.rwkv_lm import RUN_CUDA_RWKV7g

    package.RUN_CUDA_RWKV7g = RUN_CUDA_RWKV7g
torch.manual_seed(0)
model = package.RWKV(types.SimpleNamespace(
    n_layer=2, n_embd=128, dim_att=128, dim_ffn=256, head_size_a=64, head_size_divisor=8,
    vocab_size=97, ctx_len=64, my_testing=os.environ["RWKV_MY_TESTING"], train_type="", pre_ffn=0,
    my_pos_emb=0, dropout=0, head_qk=0, tiny_att_dim=-1, tiny_att_layer=-1, grad_cp=0,
))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
model = model.to(getattr(torch, sys.argv[2]))
ids = torch.randint(97, (2, 48))
logits = model(ids)
loss = torch.nn.functional.cross_entropy(logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
loss.backward()
gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
torch.save({"logits": logits.detach(), **gradients}, sys.argv[1])
"""


def run(*command: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that must end well."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_rwkv_lm_style_training_matches_plain_pytorch(tmp_path: Path) -> None:
    loud = {"RWKV_JIT_LOG_LEVEL": "info"}
    done = run(*program("run", str(TRAINING), "OWN"), tmp_path / "own", environment=loud)
    said = [line for line in done.stderr.splitlines() if "wind_backstepping" in line]
    assert said == [
        "rwkv_jit: wind_backstepping is not built: torch.ops.wind_backstepping is wkv7 of rwkv_jit"
    ]
    run(sys.executable, TRAINING, "PLAIN", tmp_path / "plain", environment={})
    assert_trains_alike(tmp_path, KERNEL_BFLOAT16)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_training_with_an_extension_for_each_step_matches_plain_pytorch(
    mode: str, tmp_path: Path
) -> None:
    asked = {"RWKV_JIT_LOG_LEVEL": "info", "RWKV_JIT_MODE": mode}
    done = run(*program("run", str(BLOCK_TRAINING), "OWN"), tmp_path / "own", environment=asked)
    assert done.stderr.count("is not built: torch.ops.rwkv7_") == 8
    run(sys.executable, BLOCK_TRAINING, "PLAIN", tmp_path / "plain", environment={})
    assert_trains_alike(tmp_path, BLOCK_BFLOAT16)


def assert_trains_alike(folder: Path, of_gradients: float) -> None:
    """Whether two trainings that were saved have the same gradients and losses, and train."""
    own, plain = (torch.load(folder / name) for name in ("own", "plain"))
    assert own["gradients"].keys() == plain["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert gradient.any(), name
        assert relative_rms(own["gradients"][name], gradient) <= of_gradients, name
    for loss, right in zip(own["losses"], plain["losses"], strict=True):
        assert abs(loss - right) <= KERNEL_BFLOAT16 * right
    assert own["losses"][-1] < 0.85 * own["losses"][0]


@pytest.mark.parametrize(
    ("op", "jit", "extensions"),
    [
        ("wkv7", "1", ("wkv_cuda", "wkv7s")),
        ("wkv6", "1", ("rwkv6",)),
        ("wkv5", "1", ("rwkv5",)),
    ],
)
def test_the_rwkv_package_generates_as_by_its_own_loops(
    op: str, jit: str, extensions: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("rwkv")
    write_checkpoint(tmp_path / "model.pth", op)
    script = tmp_path / "generate.py"
    script.write_text(GENERATION)
    results: dict[str, Any] = {}
    for name, start in (("own", program("run")), ("plain", [sys.executable])):
        cuda = "1" if name == "own" else "0"
        environment = {
            "RWKV_JIT_ON": jit, "RWKV_CUDA_ON": cuda, "RWKV_V7_ON": str(int(op == "wkv7")),
            "RWKV_JIT_LOG_LEVEL": "info",
        }  # fmt: skip
        done = run(
            *start, script, tmp_path / "model", tmp_path / name,
            *(["--its-gpu-path"] if name == "own" and op != "wkv7" else []),
            environment=environment,
        )  # fmt: skip
        results[name] = torch.load(tmp_path / name)
        if name == "own":
            for extension in extensions:
                assert f"rwkv_jit: {extension} is not built" in done.stderr
            assert f"{op}_n64_fp32_l16" in done.stdout.splitlines()[-1]
    assert len(results["plain"]) == 3 * (1 + 3 * LAYERS)
    for value, right in zip(results["own"], results["plain"], strict=True):
        assert relative_rms(value, right) <= FLOAT32


needs_rwkv_trainer = pytest.mark.skipif(
    find_spec("rwkv_trainer") is None, reason="needs rwkv-trainer"
)


@needs_rwkv_trainer
@pytest.mark.parametrize(
    ("version", "trains", "extension", "oracle"),
    [
        ("x070", "", "wind_backstepping", {"RWKV_TORCH_FALLBACK": "1"}),
        # These have no way without a kernel; ours has.
        ("x060", "", "wkv6", {"RWKV_JIT_MODE": "reference"}),
        ("x060", "states", "wkv6state", {"RWKV_JIT_MODE": "reference"}),
        ("x052", "", "wkv5", {"RWKV_JIT_MODE": "reference"}),
    ],
)
def test_rwkv_trainer_trains_as_in_plain_pytorch(
    version: str, trains: str, extension: str, oracle: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING_BY_A_PACKAGE)
    asked = {
        "RWKV_MY_TESTING": version, "RWKV_TRAIN_TYPE": trains, "RWKV_JIT_ON": "1",
        "RWKV_JIT_LOG_LEVEL": "info",
    }  # fmt: skip
    arguments = (*program("run"), script)
    done = run(*arguments, tmp_path / "own", "bfloat16", environment=asked)
    assert f"rwkv_jit: {extension} is not built" in done.stderr
    run(*arguments, tmp_path / "plain", "bfloat16", environment={**asked, **oracle})
    assert_close(tmp_path, MODEL_BFLOAT16)


@needs_rwkv_trainer
def test_rwkv_trainer_trains_by_an_imported_function_as_by_its_own(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING_BY_A_PACKAGE)
    asked = {"RWKV_MY_TESTING": "x070", "RWKV_TORCH_FALLBACK": "1", "RWKV_FLOAT_MODE": "fp32"}
    run(sys.executable, script, tmp_path / "own", "float32", "--ours", environment=asked)
    run(sys.executable, script, tmp_path / "plain", "float32", environment=asked)
    assert_close(tmp_path, FLOAT32)


def assert_close(folder: Path, limit: float) -> None:
    """Whether what was saved as own is what was saved as plain, by relative RMS error."""
    own, plain = (torch.load(folder / name) for name in ("own", "plain"))
    assert own.keys() == plain.keys()
    errors = {name: relative_rms(own[name], right) for name, right in plain.items()}
    bad = {name: f"{error:.2e}" for name, error in errors.items() if not error <= limit}
    assert not bad, f"too large: {bad}"
