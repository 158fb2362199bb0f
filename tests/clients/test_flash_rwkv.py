"""flash_rwkv, the RWKV-5 and RWKV-6 kernels that models on Hugging Face import.

Without a GPU its Python runs around a loop that stands for its kernels, written from the formula
that they document; on a GPU its kernels themselves are the oracle, for one sequence, which is what
they are right for. Relative RMS errors are asserted: 1e-5 in float32, 4e-3 in bfloat16 and 1e-3 in
float16. Upstream's tests allow 1e-1.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from comparing import random_call, relative_rms
from rwkv_jit.compat import flash_rwkv as ours

if importlib.util.find_spec("flash_rwkv") is None:
    pytest.skip("flash_rwkv is not installed", allow_module_level=True)

NAMES = {"wkv5": "rwkv5_cuda_linear_attention", "wkv6": "rwkv6_cuda_linear_attention"}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
T, H, N = 19, 2, 64

for_each_op = pytest.mark.parametrize("op", NAMES)
for_each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=str)


class Loop:
    """Stands for the extension that the package builds when it is imported."""

    def forward(
        self, _batch: int, length: int, _width: int, heads: int, state: torch.Tensor,
        r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: torch.Tensor, u: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        r, k, v = (x.double().view(length, heads, N) for x in (r, k, v))
        d = d.double().view(-1, heads, N).expand(length, heads, N)
        u, s = u.double().view(heads, 1, N), state[0].double()
        for t in range(length):
            vk = v[t, :, :, None] * k[t, :, None, :]
            y = ((s + u * vk) * r[t, :, None, :]).sum(-1)
            out.view(length, heads, N)[t] = y.to(out.dtype)
            s = s * d[t, :, None, :] + vk
        state[0] = s.float()

    forward_fp32 = forward_fp16 = forward_bf16 = forward


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_rwkv"]:
        del sys.modules[name]


@pytest.fixture(
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def without_registering(load: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`load` for the package's extensions, but for what they add to torch.ops, which nothing calls.

    Both have one name, so that each import builds a further version of the first; and a process in
    which a version registers what another, or `intercept`, has registered is aborted.
    """

    def load_alone(*, name: str, sources: list[str], **options: Any) -> Any:
        name = f"{name}_{Path(sources[0]).stem}"
        built = folder / name
        built.mkdir(parents=True, exist_ok=True)
        copies = [built / Path(source).name for source in sources]
        for source, copy in zip(sources, copies, strict=True):
            if not copy.exists():
                copy.write_text(Path(source).read_text().partition("TORCH_LIBRARY(")[0])
        return load(name=name, sources=list(map(str, copies)), build_directory=built, **options)

    return load_alone


@pytest.fixture
def client(device: str, session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package."""
    forget()
    load = without_registering(cpp_extension.load, session_cache.with_name("flash_rwkv"))
    monkeypatch.setattr(cpp_extension, "load", load if device == "cuda" else lambda **_: Loop())
    try:
        package = importlib.import_module("flash_rwkv")
    except (ImportError, OSError, RuntimeError) as error:
        forget()
        pytest.skip(f"its extensions cannot be built: {error}")
    yield package
    forget()


def arguments(op: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    tokens = random_call(1, T, H, N, op=op).tokens
    r, k, v = (tokens[name].flatten(2).to(device, dtype) for name in "rkv")
    w = tokens["w"].flatten(0 if op == "wkv5" else 2).to(device)
    u = tokens["u"].to(device, dtype)
    state = torch.randn(1, H, N, N, device=device)
    return [r, k, v, w, u.flatten() if op == "wkv5" else u, state]


@for_each_op
@for_each_dtype
def test_outputs_and_states_are_its_own(
    op: str, dtype: torch.dtype, device: str, client: Any
) -> None:
    given = arguments(op, device, dtype)
    given[3] = given[3].to(dtype)
    truths = getattr(client, NAMES[op])(*given)
    results = getattr(ours, NAMES[op])(*given)
    for result, truth in zip(results, truths, strict=True):
        assert result.shape == truth.shape
        assert result.dtype == truth.dtype
        assert relative_rms(result, truth) <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_gradients_of_rwkv5_are_its_own(device: str, client: Any) -> None:
    *given, state = arguments("wkv5", device, torch.float32)
    leaves = [x.requires_grad_() for x in given]
    # Its backward takes the state for zeros.
    state.zero_()
    grads = []
    for module in (ours, client):
        out, _ = module.rwkv5_cuda_linear_attention(*leaves, state)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for grad, right in zip(*grads, strict=True):
        assert relative_rms(grad, right) <= 1e-4


@for_each_op
def test_signatures_are_its_own(op: str, client: Any) -> None:
    functions = (getattr(module, NAMES[op]) for module in (ours, client))
    assert len({tuple(inspect.signature(function).parameters) for function in functions}) == 1


def test_every_public_name_is_there(client: Any) -> None:
    assert all(hasattr(ours, name) for name in client.__all__)
