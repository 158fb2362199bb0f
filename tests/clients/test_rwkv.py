"""rwkv, the package of RWKV-LM's author, with its kernels for RWKV-5.2 and RWKV-6 replaced by ours,
and beside a model of our RWKV-7 layers.

The package's own loops in plain PyTorch are the oracle here. Checkpoints are random. Relative RMS
errors are asserted: 1e-5 for logits and states in float32.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comparing import relative_rms
from rwkv7_model import RWKV7
from rwkv_checkpoints import HEAD_SIZE, HEADS, LAYERS, VOCABULARY, write_checkpoint
from rwkv_jit import get_op

pytest.importorskip("rwkv")

LIMIT = 1e-5
VERSIONS = {"wkv5": "5_2", "wkv6": "6_0"}

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


@contextlib.contextmanager
def imported(cuda: str, seven: str) -> Iterator[Any]:
    """The package's module, with none of its kernels built."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", cuda), ("RWKV_V7_ON", seven)):
            patch.setenv(name, value)
        patch.setattr("torch.utils.cpp_extension.load", lambda **_: None)
        patch.delitem(sys.modules, "rwkv.model", raising=False)
        # It sets them for the whole process.
        flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [flag.allow_tf32 for flag in flags], torch.backends.cudnn.benchmark
        module = importlib.import_module("rwkv.model")
        # Its loops are the oracle.
        for flag in flags:
            flag.allow_tf32 = False
        yield module
        for flag, value in zip(flags, before[0], strict=True):
            flag.allow_tf32 = value
        torch.backends.cudnn.benchmark = before[1]
        del sys.modules["rwkv.model"]


@pytest.fixture
def client() -> Iterator[Any]:
    """The module as it is with kernels, for RWKV-5 and RWKV-6."""
    with imported("1", "0") as module:
        yield module


@pytest.fixture
def client_of_rwkv7() -> Iterator[Any]:
    """The module as it is without kernels, for RWKV-7."""
    with imported("0", "1") as module:
        yield module


def run_kernel(
    op: str, state: torch.Tensor, tokens: tuple[torch.Tensor, ...], w: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The client's kernel by ours.

    state: [H, N, N] (value, key).
    tokens: r, k and v, each [T, C].
    w: of RWKV-6 raw, [1, T, H, N] in any shape; of RWKV-5 the factor, [H, N, 1].
    Returns y [1, T, C] and the next state.
    """
    r, k, v = (x.view(1, -1, HEADS, HEAD_SIZE) for x in tokens)
    w = w.view(r.shape if op == "wkv6" else u.shape[:2])
    function = get_op(
        op, head_size=HEAD_SIZE, dtype=r.dtype, device=r.device,
        decay="loglog" if op == "wkv6" else "factor",
    )  # fmt: skip
    y, final = function(r, w, k, v, u.squeeze(-1), state[None], True)
    assert final is not None
    return y.flatten(2), final[0]


@on_each_device
@pytest.mark.parametrize("op", VERSIONS)
def test_logits_and_states_match_its_own_loops(
    op: str, device: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model.pth", op)
    model = client.RWKV(str(tmp_path / "model"), f"{device} fp32", verbose=False)
    version = VERSIONS[op]
    own, with_kernel = (getattr(model, f"{prefix}att_seq_v{version}") for prefix in ("", "cuda_"))
    lengths: list[int] = []

    def run(
        _batch: int, length: int, _width: int, _heads: int, state: torch.Tensor,
        *tokens: torch.Tensor, w: torch.Tensor, u: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        lengths.append(length)
        return run_kernel(op, state, tokens, w, u)

    monkeypatch.setattr(model, f"RUN_RWKV_{version[0]}", run)

    def results(attention: Any) -> list[torch.Tensor]:
        """Logits and states of two prompts, one after the other, and a token."""
        for prefix in ("", "cuda_"):
            monkeypatch.setattr(model, f"{prefix}att_seq_v{version}", attention)
        torch.manual_seed(0)
        first, second = torch.randint(VOCABULARY, (2, 37)).tolist()
        found, state = [], None
        for ids in (first, second[:2], second[2:3]):
            logits, state = model.forward(ids, state, full_output=True)
            found += [logits, *(x.clone() for x in state)]
        return found

    truth = results(own)
    assert lengths == []
    ours = results(with_kernel)
    assert lengths == [37] * LAYERS + [2] * LAYERS
    for value, right in zip(ours, truth, strict=True):
        assert relative_rms(value, right) <= LIMIT


# It scripts its functions.
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_a_model_of_our_layers_has_the_logits_and_states_of_rwkv_7(
    client_of_rwkv7: Any, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model.pth", "wkv7")
    theirs = client_of_rwkv7.RWKV(str(tmp_path / "model"), "cpu fp32")
    ours = RWKV7.from_checkpoint(torch.load(tmp_path / "model.pth"))
    before = after = None
    for ids in (list(range(37)), [5, 6], [7]):
        logits, before = theirs.forward(ids, before, full_output=True)
        with torch.no_grad():
            mine, after = ours(torch.tensor([ids]), after)
        assert relative_rms(mine[0], logits.view(len(ids), -1)) <= LIMIT
        found = [x for layer in after for x in (*layer.att, layer.ffn)]
        for value, right in zip(found, before, strict=True):
            assert relative_rms(value[0], right) <= LIMIT
