"""The model that people copy: its names, its state, its gradients, and RWKV-LM's formulas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv7_model import HEAD_SIZE, RWKV7, LayerState, State
from rwkv_checkpoints import write_checkpoint

VOCABULARY, WIDTH, LAYERS = 50, 128, 2


@pytest.fixture
def model(seed: int) -> RWKV7:
    """A model with noise on every parameter, since several begin at zero."""
    torch.manual_seed(seed)
    model = RWKV7(VOCABULARY, WIDTH, LAYERS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(batch: int, tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, tokens))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def test_parameters_are_named_and_shaped_as_in_rwkv_lm() -> None:
    shapes = {name: tuple(p.shape) for name, p in RWKV7(VOCABULARY, WIDTH, 2).named_parameters()}
    C = WIDTH
    expected = {
        "emb.weight": (VOCABULARY, C),
        "head.weight": (VOCABULARY, C),
        "blocks.0.ln0.weight": (C,),
        "blocks.0.ln0.bias": (C,),
        "ln_out.weight": (C,),
        "ln_out.bias": (C,),
    }
    for layer in range(2):
        block, att, ffn = (f"blocks.{layer}.{part}" for part in ("", "att.", "ffn."))
        for norm in (f"{block}ln1", f"{block}ln2", f"{att}ln_x"):
            expected |= {f"{norm}.weight": (C,), f"{norm}.bias": (C,)}
        vectors = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"]
        ranks = {"w": 32, "a": 32, "g": 64}
        if layer > 0:
            vectors.append("v0")
            ranks["v"] = 32
        expected |= {att + name: (1, 1, C) for name in vectors}
        for name, rank in ranks.items():
            expected |= {f"{att}{name}1": (C, rank), f"{att}{name}2": (rank, C)}
        expected |= {f"{att}r_k": (C // HEAD_SIZE, HEAD_SIZE), f"{ffn}x_k": (1, 1, C)}
        for name in ("receptance", "key", "value", "output"):
            expected[f"{att}{name}.weight"] = (C, C)
        expected |= {f"{ffn}key.weight": (4 * C, C), f"{ffn}value.weight": (C, 4 * C)}
    assert shapes == expected


def test_logits_are_those_of_the_formulas_written_out_token_by_token(model: RWKV7) -> None:
    tokens = random_tokens(2, 19)
    logits, _ = model(tokens)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    assert relative_error(logits, literal_rwkv7(weights, tokens)) < 1e-4


def test_gradients_are_those_of_the_formulas(model: RWKV7) -> None:
    tokens, dy = random_tokens(1, 11), torch.randn(1, 11, VOCABULARY)
    model(tokens)[0].backward(dy)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    for weight in weights.values():
        weight.requires_grad_()
    literal_rwkv7(weights, tokens).backward(dy.double())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, weights[name].grad) < 1e-4, name


def test_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.pth", "wkv7")
    saved = torch.load(tmp_path / "model.pth")
    for number in "012":  # in RWKV-LM's models, and for nothing
        saved[f"blocks.0.att.v{number}"] = saved[f"blocks.1.att.v{number}"]
    model = RWKV7.from_checkpoint(saved)
    loaded = model.state_dict()
    assert set(saved) - set(loaded) == {f"blocks.0.att.v{number}" for number in "012"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved[name]), name
        assert tensor.data_ptr() != saved[name].data_ptr()


def test_packed_sequences_have_the_logits_of_separate_ones(model: RWKV7) -> None:
    first, second = random_tokens(1, 13), random_tokens(1, 6)
    bounds = torch.tensor([0, 13, 19])
    logits, _ = model(torch.cat([first, second], dim=1), cu_seqlens=bounds)
    separate = torch.cat([model(first)[0], model(second)[0]], dim=1)
    assert relative_error(logits, separate) < 1e-5


def test_state_continues_the_sequence(model: RWKV7) -> None:
    tokens = random_tokens(3, 40)
    whole, end = model(tokens)
    first, state = model(tokens[:, :23])
    second, last = model(tokens[:, 23:], state)
    assert relative_error(torch.cat([first, second], dim=1), whole) < 1e-5
    for ours, theirs in zip(last, end, strict=True):
        assert relative_error(ours.ffn, theirs.ffn) < 1e-5
        for mine, other in zip(ours.att, theirs.att, strict=True):
            assert relative_error(mine, other) < 1e-5


def test_token_by_token_gives_the_logits_of_the_whole(model: RWKV7) -> None:
    tokens = random_tokens(2, 20)
    whole, _ = model(tokens)
    state: State | None = None
    steps = []
    for position in range(tokens.shape[1]):
        logits, state = model(tokens[:, position : position + 1], state)
        steps.append(logits)
    assert relative_error(torch.cat(steps, dim=1), whole) < 1e-5


def test_state_has_the_shapes_that_it_documents(model: RWKV7) -> None:
    _, state = model(random_tokens(3, 5))
    heads = WIDTH // HEAD_SIZE
    assert len(state) == LAYERS
    for layer in state:
        assert isinstance(layer, LayerState)
        assert layer.att.shift.shape == layer.ffn.shape == (3, WIDTH)
        assert layer.att.wkv.shape == (3, heads, HEAD_SIZE, HEAD_SIZE)
        assert layer.att.wkv.dtype == torch.float32


def test_no_token_sees_a_later_one(model: RWKV7) -> None:
    tokens = random_tokens(1, 30)
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % VOCABULARY
    logits, altered = model(tokens)[0], model(changed)[0]
    assert torch.equal(logits[:, :17], altered[:, :17])
    assert not torch.equal(logits[:, 17:], altered[:, 17:])


def test_every_parameter_gets_a_gradient(model: RWKV7) -> None:
    logits, _ = model(random_tokens(2, 24))
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_flow_through_the_state(model: RWKV7) -> None:
    tokens = random_tokens(1, 12)
    _, state = model(tokens)
    logits, _ = model(tokens, state)
    logits.square().mean().backward()
    assert model.blocks[0].att.key.weight.grad.any()


@pytest.mark.parametrize("layers", [1, 3])
def test_fresh_model_is_finite_and_knows_nothing(layers: int) -> None:
    logits, _ = RWKV7(VOCABULARY, WIDTH, layers)(random_tokens(2, 16))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(VOCABULARY, (32,)))
    assert abs(loss.item() - torch.tensor(float(VOCABULARY)).log().item()) < 0.5


@pytest.mark.parametrize("width", [0, 32, 100])
def test_width_that_is_no_multiple_of_the_head_size_is_refused(width: int) -> None:
    message = f"width={width} must be a positive multiple of head_size=64"
    with pytest.raises(ValueError, match=re.escape(message)):
        RWKV7(VOCABULARY, width, 1)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_agrees_with_the_cpu(model: RWKV7) -> None:
    tokens = random_tokens(2, 50)
    expected, _ = model(tokens)
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits, _ = model(tokens.cuda())
    assert relative_error(logits.cpu(), expected) < 0.03


def literal_rwkv7(z: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """RWKV-7 from a checkpoint's tensors, one token and one head at a time, in float64."""
    layers = 1 + max(int(name.split(".")[1]) for name in z if name.startswith("blocks."))
    return torch.stack([literal_sequence(z, layers, row) for row in tokens])


def literal_sequence(z: dict[str, Tensor], layers: int, tokens: Tensor) -> Tensor:
    C = z["emb.weight"].shape[1]
    zeros = torch.zeros(C, dtype=torch.float64)
    att_before, ffn_before = [zeros] * layers, [zeros] * layers
    states: dict[tuple[int, int], Tensor] = {}
    logits = []

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * z[f"{name}.weight"] + z[f"{name}.bias"]

    for token in tokens:
        x = norm(z["emb.weight"][token], "blocks.0.ln0")
        v_first = zeros
        for i in range(layers):
            p = {
                name.removeprefix(f"blocks.{i}.att."): tensor.squeeze()
                for name, tensor in z.items()
                if name.startswith(f"blocks.{i}.att.")
            }
            now, before = norm(x, f"blocks.{i}.ln1"), att_before[i]
            att_before[i] = now
            mixed = {c: now + (before - now) * p[f"x_{c}"] for c in "rwkvag"}
            r = p["receptance.weight"] @ mixed["r"]
            k = p["key.weight"] @ mixed["k"]
            v = p["value.weight"] @ mixed["v"]
            pre_w = p["w0"] + torch.tanh(mixed["w"] @ p["w1"]) @ p["w2"]
            # exp(-exp(-softplus(-x) - 1/2)) = exp(-exp(-1/2) * sigmoid(x))
            decay = torch.exp(-torch.sigmoid(pre_w) * torch.tensor(-0.5).double().exp())
            rate = torch.sigmoid(p["a0"] + mixed["a"] @ p["a1"] @ p["a2"])
            gate = torch.sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
            if i == 0:
                v_first = v
            else:
                keep = torch.sigmoid(p["v0"] + mixed["v"] @ p["v1"] @ p["v2"])
                v = (1 - keep) * v + keep * v_first
            removal, k = k * p["k_k"], k * (1 + (rate - 1) * p["k_a"])
            heads = []
            for h in range(C // HEAD_SIZE):
                part = slice(h * HEAD_SIZE, (h + 1) * HEAD_SIZE)
                kk = removal[part] / removal[part].norm()
                before_state = states.get((i, h), torch.zeros(HEAD_SIZE, HEAD_SIZE).double())
                state = (
                    before_state * decay[part]
                    - torch.outer(before_state @ kk, kk * rate[part])
                    + torch.outer(v[part], k[part])
                )
                states[i, h] = state
                y = state @ r[part]
                y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt()
                y = y * p["ln_x.weight"][part] + p["ln_x.bias"][part]
                heads.append(y + (r[part] * k[part] * p["r_k"][h]).sum() * v[part])
            x = x + p["output.weight"] @ (torch.cat(heads) * gate)
            now, before = norm(x, f"blocks.{i}.ln2"), ffn_before[i]
            ffn_before[i] = now
            hidden = z[f"blocks.{i}.ffn.key.weight"] @ (
                now + (before - now) * z[f"blocks.{i}.ffn.x_k"].squeeze()
            )
            x = x + z[f"blocks.{i}.ffn.value.weight"] @ hidden.clamp_min(0) ** 2
        logits.append(z["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits)
