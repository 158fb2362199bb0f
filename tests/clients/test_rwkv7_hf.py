"""rwkv7-hf, an RWKV-7 for Hugging Face Transformers, with its operator replaced by ours.

The package has one operator, `rwkv7_recurrent`, in plain PyTorch: the oracle here. Models have
random weights. Relative RMS errors are asserted: 1e-5 for logits and states in float32, 1e-4 for
the gradient of every parameter, 2e-2 for logits in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from comparing import relative_rms
from rwkv_jit import Op, get_op

pytest.importorskip("rwkv7_hf")

from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM, modeling_rwkv7
from rwkv7_hf.ops_rwkv7 import rwkv7_recurrent

LOGITS, GRADIENTS, BFLOAT16_LOGITS = 1e-5, 1e-4, 2e-2
LAYERS, VOCABULARY = 2, 97
# Keeps the logarithm and its gradient finite where a decay is 0, and alters no decay above 1e-22.
SMALLEST_DECAY = 1e-30

Recurrence = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Results = dict[str, torch.Tensor]

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


def op_for(x: torch.Tensor) -> Op:
    return get_op(
        "wkv7", head_size=x.shape[-1], dtype=x.dtype, device=x.device, decay="log",
        state_layout="kv",
    )  # fmt: skip


def masked_recurrent(
    receptance: torch.Tensor,
    decay: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The client's operator by ours; a masked token is one that leaves the state as it is.

    receptance, key, value, a, b: [B, T, H, N] in the model's dtype.
    decay: [B, T, H, N], float32, the factor itself.
    initial_state: [B, H, N, N] (key, value), float32.
    attention_mask: [B, T], bool; False for padding, whose output is 0.
    """
    w = torch.log(decay + SMALLEST_DECAY)
    if attention_mask is not None:
        padding = ~attention_mask[..., None, None]
        w, key, a = (x.masked_fill(padding, 0) for x in (w, key, a))
    y, final_state = op_for(key)(receptance, w, key, value, a, b, initial_state, True)
    assert final_state is not None
    return y if attention_mask is None else y.masked_fill(padding, 0), final_state


def packed_recurrent(
    receptance: torch.Tensor,
    decay: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor,
    attention_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the masked tokens left out of one packed batch."""
    tokens = (receptance, torch.log(decay + SMALLEST_DECAY), key, value, a, b)
    packed = [x[attention_mask][None] for x in tokens]
    bounds = torch.nn.functional.pad(attention_mask.sum(1).cumsum(0), (1, 0))
    y, final_state = op_for(key)(*packed, initial_state, True, bounds)
    assert final_state is not None
    return torch.zeros_like(value).index_put((attention_mask,), y[0]), final_state


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The client's operator is thousands of tiny ones, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recurrence], list[int]]:
    """Puts an operator into the client; returns the lengths T that it is then called with."""

    def install(recurrence: Recurrence) -> list[int]:
        lengths: list[int] = []

        def counted(receptance: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            lengths.append(receptance.shape[1])
            return recurrence(receptance, *rest)

        monkeypatch.setattr(modeling_rwkv7, "rwkv7_recurrent", counted)
        return lengths

    return install


def make_model(device: str, dtype: torch.dtype = torch.float32) -> RWKV7ForCausalLM:
    """A small model whose every parameter is random and whose decays spread over their range.

    The first output of a sequence is a multiple of v, whose size the normalisation after the
    operator takes out again: where it is tiny, float32 leaves gradients 3 digits. A larger
    norm_eps than the usual 1e-5 keeps such draws out of what is measured.
    """
    config = RWKV7Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=LAYERS, head_dim=64,
        intermediate_size=192, decay_low_rank_dim=16, gate_low_rank_dim=16, a_low_rank_dim=16,
        v_low_rank_dim=16, norm_eps=1e-3,
    )  # fmt: skip
    model = RWKV7ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 3.0 if name.endswith("w_lora.lora.2.bias") else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.to(device, dtype).eval()


def draw_ids(device: str, *shape: int) -> torch.Tensor:
    """Token ids but 0, which stands for padding."""
    return torch.randint(1, VOCABULARY, shape).to(device)


def left_padding(device: str, length: int, padded: list[int]) -> torch.Tensor:
    """A mask [B, T] whose rows begin with so many masked tokens."""
    mask = torch.arange(length) >= torch.tensor(padded)[:, None]
    return mask.long().to(device)


def gradients(model: RWKV7ForCausalLM, loss: torch.Tensor) -> Results:
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    assert all(grad.any() for grad in grads), "every parameter has a part in the loss"
    return {f"d{name}": grad for name, grad in zip(parameters, grads, strict=True)}


def assert_close(results: Results, truth: Results) -> None:
    """Each result within the tolerance of its kind: a name that begins with d is a gradient's."""
    assert results.keys() == truth.keys()
    errors = {name: relative_rms(results[name], truth[name]) for name in truth}
    bad = {
        name: f"{error:.2e}"
        for name, error in errors.items()
        if not error <= (GRADIENTS if name.startswith("d") else LOGITS)
    }
    assert not bad, f"too large: {bad}"


def train(model: RWKV7ForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Results:
    """Logits, loss and gradients of one step; logits of padding are left out."""
    out = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    logits = out.logits if mask is None else out.logits[mask.bool()]
    return {"logits": logits, "loss": out.loss, **gradients(model, out.loss)}


@on_each_device
@pytest.mark.parametrize("length", [1, 16, 37])
def test_logits_match_its_own_operator(
    device: str, length: int, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 2, length)
    with torch.no_grad():
        truth = model(ids).logits
        lengths = calls(masked_recurrent)
        logits = model(ids).logits
    assert lengths == [length] * LAYERS
    assert_close({"logits": logits}, {"logits": truth})


@on_each_device
def test_gradients_of_all_parameters_match_its_own_operator(
    device: str, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 3, 37)
    truth = train(model, ids)
    lengths = calls(masked_recurrent)
    assert_close(train(model, ids), truth)
    assert lengths == [37] * LAYERS


@on_each_device
def test_gradients_are_the_same_with_activation_checkpointing(
    device: str, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 2, 37)
    lengths = calls(masked_recurrent)
    truth = train(model, ids)
    model.train().model.gradient_checkpointing = True
    assert_close(train(model, ids), truth)
    assert len(lengths) == LAYERS * 3, "once, then twice for each layer"


@on_each_device
@pytest.mark.parametrize("recurrence", [masked_recurrent, packed_recurrent])
def test_left_padding_matches_its_own_operator(
    device: str, recurrence: Recurrence, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 4, 37)
    mask = left_padding(device, 37, [0, 5, 20, 36])
    truth = train(model, ids, mask)
    lengths = calls(recurrence)
    assert_close(train(model, ids, mask), truth)
    assert lengths == [37] * LAYERS


@on_each_device
def test_left_padding_does_not_change_the_logits(
    device: str, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 2, 37)
    calls(masked_recurrent)
    with torch.no_grad():
        padded = model(ids, attention_mask=left_padding(device, 37, [0, 18])).logits[1:, 18:]
        alone = model(ids[1:, 18:]).logits
    assert_close({"logits": padded}, {"logits": alone})


def in_pieces(model: RWKV7ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> Results:
    """A batch in three calls joined by the cache; the loss is that of the last call."""
    cache, pieces = None, []
    for begin, end in ((0, 19), (19, 20), (20, ids.shape[1])):
        out = model(
            ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache,
            labels=ids[:, begin:end], use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        pieces.append(out.logits)
    assert cache is not None
    states = {f"state {layer}": x for layer, x in enumerate(cache.recurrent_state)}
    logits = torch.cat(pieces, 1)[mask.bool()]
    return {"logits": logits, **states, **gradients(model, out.loss)}


@on_each_device
def test_cache_carries_the_state_and_its_gradient(
    device: str, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 3, 37)
    mask = left_padding(device, 37, [0, 3, 17])
    truth = in_pieces(model, ids, mask)
    lengths = calls(masked_recurrent)
    results = in_pieces(model, ids, mask)
    assert lengths == [19] * LAYERS + [1] * LAYERS + [17] * LAYERS
    assert_close(results, truth)
    whole = model(ids, attention_mask=mask).logits[mask.bool()]
    assert_close({"logits": results["logits"]}, {"logits": whole})


def generate(model: RWKV7ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, beams: int) -> Results:
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False,
        num_beams=beams, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {"ids": out.sequences, "logits": torch.stack(out.logits)}


@on_each_device
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_picks_the_same_tokens_as_with_its_own_operator(
    device: str, beams: int, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device), draw_ids(device, 2, 37)
    mask = left_padding(device, 37, [0, 6])
    ids = ids * mask
    truth = generate(model, ids, mask, beams)
    lengths = calls(masked_recurrent)
    results = generate(model, ids, mask, beams)
    assert lengths == [37] * LAYERS + [1] * LAYERS * 11
    assert results["ids"].shape == (2, 49)
    assert torch.equal(results["ids"], truth["ids"])
    assert_close({"logits": results["logits"]}, {"logits": truth["logits"]})


@on_each_device
def test_bfloat16_is_as_good_as_with_its_own_operator(
    device: str, calls: Callable[[Recurrence], list[int]]
) -> None:
    model, ids = make_model(device, torch.bfloat16), draw_ids(device, 2, 37)
    mask = left_padding(device, 37, [0, 9])
    own = train(model, ids, mask)
    exact = train(make_exact(model), ids, mask)
    lengths = calls(masked_recurrent)
    ours = train(model, ids, mask)
    assert lengths == [37] * LAYERS
    assert ours["logits"].dtype == torch.bfloat16
    assert relative_rms(ours["logits"], own["logits"]) <= BFLOAT16_LOGITS
    own_error, error = (mean_gradient_error(results, exact) for results in (own, ours))
    assert error <= 1.3 * own_error


def mean_gradient_error(results: Results, truth: Results) -> float:
    """Mean over the parameters of the error; infinite where a gradient is not finite."""
    names = [name for name in truth if name.startswith("d")]
    return sum(relative_rms(results[name], truth[name]) for name in names) / len(names)


def make_exact(model: RWKV7ForCausalLM) -> RWKV7ForCausalLM:
    """The same weights, in float32."""
    exact = RWKV7ForCausalLM(model.config).to(model.device)
    exact.load_state_dict(model.state_dict())
    return exact.eval()


def draw_call(device: str, length: int) -> dict[str, torch.Tensor]:
    """Arguments of the operator for B = 3 and H = 2, some decays of them 0 or 1."""
    shape = (3, length, 2, 64)
    kk = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    decay = torch.rand(shape)
    decay[decay < 0.2] = 0
    decay[decay > 0.8] = 1
    call = {
        "receptance": torch.randn(shape),
        "decay": decay,
        "key": torch.randn(shape),
        "value": torch.randn(shape),
        "a": -kk,
        "b": kk * torch.rand(shape),
        "initial_state": torch.randn(3, 2, 64, 64),
    }
    return {name: x.to(device).requires_grad_() for name, x in call.items()}


def run(
    recurrence: Recurrence, call: dict[str, torch.Tensor], mask: torch.Tensor, dy: torch.Tensor,
    dstate: torch.Tensor,
) -> Results:  # fmt: skip
    y, state = recurrence(*call.values(), mask)
    grads = torch.autograd.grad((y, state), list(call.values()), (dy, dstate))
    return {"y": y, "state": state, **{f"d{n}": g for n, g in zip(call, grads, strict=True)}}


@on_each_device
@pytest.mark.parametrize("recurrence", [masked_recurrent, packed_recurrent])
def test_decays_of_zero_and_any_mask_match_its_own_operator(
    device: str, recurrence: Recurrence
) -> None:
    call = draw_call(device, 37)
    mask = torch.rand(3, 37) < 0.7
    mask[1] = False
    mask = mask.to(device)
    given = torch.randn(3, 37, 2, 64).to(device), torch.randn(3, 2, 64, 64).to(device)
    results = run(recurrence, call, mask, *given)
    assert_close(results, run(rwkv7_recurrent, call, mask, *given))
    assert not results["y"][~mask].any()
    assert torch.equal(results["state"][1], call["initial_state"][1])
