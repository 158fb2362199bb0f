"""rwkv-simple, an RWKV-6 in PyTorch, with its kernel replaced by ours.

The package's own chunked operator in float64, `wkv6_torch`, is the oracle here. Models have random
weights. Relative RMS errors are asserted: 1e-5 for logits in float32, 1e-4 for the gradient of
every parameter. In bfloat16, where the most is the rounding of the whole model, logits are at most
1.2 times as far from those in float32 as by its own operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from comparing import relative_rms
from rwkv_jit import get_op

pytest.importorskip("rwkv_simple")

from rwkv_simple import rwkv as client

LOGITS, GRADIENTS, OF_ITS_OWN_ERROR = 1e-5, 1e-4, 1.2
LAYERS, VOCABULARY, WIDTH, HEAD_SIZE = 2, 97, 128, 64

Kernel = Callable[..., torch.Tensor]

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


def kernel(
    r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """The client's kernel by ours: r, k, v [B, T, H, N], w the logarithm of the decay, u [H, N]."""
    op = get_op("wkv6", head_size=r.shape[-1], dtype=r.dtype, device=r.device, decay="log")
    y, _ = op(r, w, k, v, u)
    return y


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """The oracle is decorated with torch.compile; it is run as it stands."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts our kernel into the client; the lengths T that it is then called with."""
    lengths: list[int] = []

    def counted(r: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        lengths.append(r.shape[1])
        return kernel(r, *rest)

    monkeypatch.setattr(client, "wkv6_cuda", counted)
    return lengths


def make_model(device: str, dtype: torch.dtype = torch.float32) -> client.RWKV:
    """A small model whose every parameter is random: several begin at zero."""
    model = client.RWKV(WIDTH, d_head=HEAD_SIZE, n_layer=LAYERS, vocab_size=VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype)


def use(model: client.RWKV, backend: client.WKVBackend) -> client.RWKV:
    for block in model.blocks:
        block.att.wkv_backend = backend
    return model


def logits_of(model: client.RWKV, ids: torch.Tensor, backend: client.WKVBackend) -> torch.Tensor:
    logits: torch.Tensor = use(model, backend)(ids, need_state=False)
    return logits


def draw_ids(device: str, batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), device=device)


@on_each_device
@pytest.mark.parametrize("length", [2, 16, 38, 128])
def test_logits_match_its_own_operator(device: str, length: int, calls: list[int]) -> None:
    model, ids = make_model(device), draw_ids(device, 2, length)
    with torch.no_grad():
        truth = logits_of(model, ids, client.WKVBackend.PYTORCH_OPTIMIZED)
        logits = logits_of(model, ids, client.WKVBackend.CUDA)
    assert calls == [length] * LAYERS
    assert relative_rms(logits, truth) <= LOGITS


@on_each_device
def test_gradients_of_all_parameters_match_its_own_operator(device: str, calls: list[int]) -> None:
    model, ids = make_model(device), draw_ids(device, 3, 38)
    names = [name for name, _ in model.named_parameters()]

    def gradients(backend: client.WKVBackend) -> tuple[torch.Tensor, ...]:
        logits = logits_of(model, ids, backend)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return torch.autograd.grad(loss, list(model.parameters()))

    truth = gradients(client.WKVBackend.PYTORCH_OPTIMIZED)
    ours = gradients(client.WKVBackend.CUDA)
    assert calls == [38] * LAYERS
    for name, grad, right in zip(names, ours, truth, strict=True):
        assert right.any(), f"{name} has a part in the loss"
        assert relative_rms(grad, right) <= GRADIENTS, name


@on_each_device
def test_bfloat16_is_as_near_to_float32_as_its_own_operator(device: str, calls: list[int]) -> None:
    model, ids = make_model(device, torch.bfloat16), draw_ids(device, 2, 38)
    exact = make_model(device)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = logits_of(exact, ids, client.WKVBackend.PYTORCH_OPTIMIZED)
        own = logits_of(model, ids, client.WKVBackend.PYTORCH_OPTIMIZED)
        logits = logits_of(model, ids, client.WKVBackend.CUDA)
    assert calls == [38] * LAYERS
    assert logits.dtype == own.dtype == torch.bfloat16
    assert relative_rms(logits, truth) <= OF_ITS_OWN_ERROR * relative_rms(own, truth)
