"""RWKV-7's time mixing: its parameters and their beginnings, its state, its gradients."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from comparing import relative_rms
from running import ROOT
from rwkv_jit.errors import ArgumentError
from rwkv_jit.nn import Ranks, TimeMix7, TimeMix7State

WIDTH, LAYERS = 64, 3
LIMIT = 1e-5

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


def noisy(layer: int = 1) -> TimeMix7:
    """A layer with noise on every parameter, since several begin at zero."""
    module = TimeMix7(layer, LAYERS, WIDTH, 16, ranks=Ranks(8, 8, 8, 8))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """x and v_first."""
    return torch.randn(batch, length, WIDTH), torch.randn(batch, length, WIDTH)


def close(ours: Any, theirs: Any, limit: float = LIMIT) -> bool:
    """Whether two tensors, or two tuples of them, are the same within the limit."""
    if isinstance(ours, Tensor):
        return relative_rms(ours, theirs) <= limit
    return all(close(one, other, limit) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layer", [0, 2])
def test_fresh_parameters_are_rwkv_lms(layer: int) -> None:
    C, N, height = 128, 32, 1 - layer / LAYERS
    module = TimeMix7(layer, LAYERS, C, N)
    expected = {
        "x_r": lambda i: 1 - (i / C) ** (0.2 * height),
        "x_w": lambda i: 1 - (i / C) ** (0.9 * height),
        "x_k": lambda i: 1 - (i / C) ** (0.7 * height),
        "x_v": lambda i: 1 - (i / C) ** (0.7 * height),
        "x_a": lambda i: 1 - (i / C) ** (0.9 * height),
        "x_g": lambda i: 1 - (i / C) ** (0.2 * height),
        "w0": lambda i: (
            -6 + 6 * (i / (C - 1)) ** (1 + (layer / (LAYERS - 1)) ** 0.3) + 0.5 + zigzag(i) * 2.5
        ),
        "a0": lambda i: -0.19 + zigzag(i) * 0.3 + (i / (C - 1) - 0.5) * 0.4,
        "k_k": lambda i: 0.71 - (i / (C - 1) - 0.5) * 0.1,
        "k_a": lambda _: 1.02,
    }
    if layer > 0:
        expected["v0"] = lambda i: 0.73 - (i / (C - 1) - 0.5) * 0.4

    def zigzag(i: int) -> float:
        place = (i % N - (N - 1) / 2) / ((N - 1) / 2)
        return place * abs(place)

    for name, value in expected.items():
        right = torch.tensor([value(i) for i in range(C)]).view(1, 1, C)
        torch.testing.assert_close(getattr(module, name), right, atol=2e-6, rtol=2e-5, msg=name)
    for name in "wag" if layer == 0 else "wavg":
        first, second = getattr(module, f"{name}1"), getattr(module, f"{name}2")
        assert not first.any()
        assert first.shape == second.T.shape
        torch.testing.assert_close(second @ second.T, 0.01 * torch.eye(len(second)))
    assert (module.r_k == torch.full((C // N, N), -0.04)).all()
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("output", 0.0)):
        weight = getattr(module, name).weight
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(C), atol=1e-5, rtol=0)
    assert (module.ln_x.weight == ((1 + layer) / LAYERS) ** 0.7).all()
    assert not module.ln_x.bias.any()
    assert module.ln_x.eps == 64e-5


@pytest.mark.parametrize(
    ("width", "ranks"), [(768, (64, 64, 32, 128)), (4096, (160, 160, 96, 320)), (64, (32,) * 4)]
)
def test_suggested_ranks_are_rwkv_lms(width: int, ranks: tuple[int, ...]) -> None:
    assert Ranks.suggested(width) == ranks


def test_a_model_of_one_layer_begins_finite() -> None:
    assert all(p.isfinite().all() for p in TimeMix7(0, 1, WIDTH, 16).parameters())


def test_parameters_can_be_made_without_memory_and_filled_later() -> None:
    module = TimeMix7(1, LAYERS, WIDTH, 16, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    fresh = TimeMix7(1, LAYERS, WIDTH, 16)
    assert (module.w0 == fresh.w0.bfloat16()).all()
    assert not module.output.weight.any()


def test_the_first_layer_ignores_what_rwkv_lm_has_there_for_nothing() -> None:
    module = noisy(0)
    unused = {"v0": torch.ones(1), "v1": torch.ones(1), "v2": torch.ones(1)}
    given = {**noisy(0).state_dict(), **unused}
    module.load_state_dict(given)
    assert list(given) == [*module.state_dict(), "v0", "v1", "v2"]
    assert torch.equal(module.w0, given["w0"])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**given, "v3": torch.ones(1)})


@on_each_device
@pytest.mark.parametrize("layer", [0, 1])
def test_two_halves_are_the_whole(layer: int, device: str) -> None:
    module = noisy(layer).to(device)
    x, v_first = (t.to(device) for t in inputs(2, 24))
    whole, v, end = module(x, v_first, output_state=True)
    state: TimeMix7State | None = None
    parts = []
    for piece in (slice(0, 9), slice(9, 10), slice(10, 24)):
        y, _, state = module(x[:, piece], v_first[:, piece], state, output_state=True)
        parts.append(y)
    assert close(torch.cat(parts, dim=1), whole)
    assert close(state, end)
    assert (v is v_first) == (layer > 0)
    assert end.shift.shape == (2, WIDTH)
    assert end.wkv.shape == (2, WIDTH // 16, 16, 16)
    assert end.wkv.dtype == torch.float32


def test_a_state_is_returned_only_where_it_is_asked_for() -> None:
    assert noisy()(*inputs(1, 3))[2] is None


@on_each_device
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_are_the_separate_ones(with_state: bool, device: str) -> None:
    module = noisy().to(device)
    lengths = [5, 0, 17, 1]
    x, v_first = (t.to(device) for t in inputs(1, sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device)
    state = None
    if with_state:
        state = TimeMix7State(
            torch.randn(4, WIDTH, device=device), torch.randn(4, 4, 16, 16, device=device)
        )
    y, _, end = module(x, v_first, state, output_state=True, cu_seqlens=bounds)
    for s, length in enumerate(lengths):
        before = None if state is None else TimeMix7State(*(part[s : s + 1] for part in state))
        if length == 0:
            untouched = TimeMix7State(*(torch.zeros_like(part[:1]) for part in end))
            assert close([part[s : s + 1] for part in end], before or untouched)
            continue
        tokens = slice(bounds[s], bounds[s + 1])
        alone, _, last = module(x[:, tokens], v_first[:, tokens], before, output_state=True)
        assert close(y[:, tokens], alone)
        assert close([part[s : s + 1] for part in end], last)


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_flow_through_everything(layer: int) -> None:
    module = noisy(layer)
    x, v_first = (t.requires_grad_() for t in inputs(2, 7))
    start = TimeMix7State(torch.randn(2, WIDTH), torch.randn(2, 4, 16, 16))
    for part in start:
        part.requires_grad_()
    y, _, end = module(x, v_first if layer else None, start, output_state=True)
    (y.square().sum() + end.wkv.square().sum()).backward()
    reached = [x, *start, *module.parameters(), *([v_first] if layer else [])]
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in reached)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    module = noisy()
    x, v_first = inputs(2, 20)
    leaves = [x.requires_grad_(), *module.parameters()]
    plain = torch.autograd.grad(module(x, v_first)[0].square().sum(), leaves)
    again = torch.autograd.grad(
        checkpoint(module, x, v_first, use_reentrant=False)[0].square().sum(), leaves
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_copies_and_pickles_compute_the_same() -> None:
    module = noisy()
    given = inputs(1, 5)
    right = module(*given)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*given)[0], right)


# torch's own tracer makes an instance of every autograd.Function.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph_once_it_has_run() -> None:
    module = noisy()
    given = inputs(2, 12)
    right = module(*given)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert close(compiled(*given)[0], right)


@on_each_device
def test_autocast_computes_in_its_dtype(device: str) -> None:
    module = noisy().to(device)
    x, v_first = (t.to(device) for t in inputs(2, 20))
    right, _, _ = module(x, v_first)
    with torch.autocast(device, torch.bfloat16):
        y, _, end = module(x, v_first.bfloat16(), output_state=True)
    assert y.dtype == torch.bfloat16
    assert end.wkv.dtype == torch.float32
    assert relative_rms(y, right) < 2e-2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 100, 64), "width=100 must be a positive multiple of head_size=64"),
        ((0, 1, 0, 64), "width=0 must be a positive multiple of head_size=64"),
        ((2, 2, 64, 64), "layer=2 must be at least 0 and below layers=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        TimeMix7(*sizes)


def test_a_later_layer_without_the_firsts_values_is_refused() -> None:
    with pytest.raises(ArgumentError, match="v_first is None in layer 1; pass what the first"):
        noisy()(inputs(1, 3)[0])


def test_a_checkpoint_without_the_layer_is_refused() -> None:
    message = r"TimeMix7: the checkpoint has no blocks\.5\.att\.\*"
    with pytest.raises(ArgumentError, match=message):
        TimeMix7.from_checkpoint({"emb.weight": torch.ones(1)}, 5, 6)


REFERENCE_MODE = """
import sys
import torch
from rwkv_jit.nn import ChannelMix7, TimeMix7, l2wrap_cross_entropy

torch.manual_seed(0)
att, ffn = TimeMix7(1, 2, 32, 16), ChannelMix7(1, 2, 32)
with torch.no_grad():
    for parameter in (*att.parameters(), *ffn.parameters()):
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
x, v_first = torch.randn(2, 1, 5, 32)
y, _, state = att(x, v_first, output_state=True)
z, _ = ffn(y)
loss = l2wrap_cross_entropy(z, torch.randint(32, (1, 5)))
loss.backward()
torch.save([y.detach(), loss.detach(), state.wkv.detach(), att.x_w.grad, ffn.x_k.grad], sys.argv[1])
"""


def test_reference_mode_needs_no_kernel(tmp_path: Path) -> None:
    found = {}
    for mode in ("reference", "auto"):
        environment = {**os.environ, "RWKV_JIT_MODE": mode, "PYTHONPATH": str(ROOT)}
        if mode == "reference":
            environment.update(PATH="", CXX="", RWKV_JIT_CACHE_DIR=str(tmp_path / "cache"))
        command = [sys.executable, "-c", REFERENCE_MODE, str(tmp_path / mode)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found[mode] = torch.load(tmp_path / mode)
    assert not (tmp_path / "cache").exists()
    assert close(found["auto"], found["reference"])
