"""What torch asks of an operator: fakes, opcheck, compile, autocast, graphs, streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from comparing import SEQUENCE_OPS, random_call, reference, relative_rms, run
from rwkv_jit import Op, get_op
from rwkv_jit.autograd import torch_ops
from rwkv_jit.errors import KernelMissingError

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
for_each_op = pytest.mark.parametrize("name", SEQUENCE_OPS)


def small_op(device: str, dtype: torch.dtype = torch.float32, name: str = "wkv7") -> Op:
    return get_op(name, head_size=32, dtype=dtype, device=device)


def leaves(device: str, length: int = 21, batch: int = 2, name: str = "wkv7") -> list[torch.Tensor]:
    """The operator's first arguments, then an initial state."""
    call = random_call(batch, length, 2, 32, op=name)
    assert call.initial_state is not None
    tensors = (*call.tokens.values(), call.initial_state)
    return [x.float().to(device).requires_grad_() for x in tensors]


@on_each_device
@for_each_op
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_opcheck_passes_for_both_registered_ops(
    device: str, name: str, packed: bool, with_state: bool
) -> None:
    op, ops = small_op(device, name=name), torch_ops(name)
    *tokens, state = (x.detach() for x in leaves(device, 40, batch=1, name=name))
    bounds = torch.tensor([0, 7, 7, 40], device=device) if packed else None
    state = state.repeat(3, 1, 1, 1) if packed else state
    slug = op.config.slug
    forward = (*tokens, bounds, state if with_state else None, slug, with_state, True)
    torch.library.opcheck(ops.forward, forward)
    y, final, checkpoints = ops.forward(*forward)
    dfinal = torch.randn_like(final) if with_state else None
    backward = (*tokens, bounds, checkpoints, torch.randn_like(y), dfinal, slug, with_state)
    torch.library.opcheck(ops.backward, backward)


def test_fakes_give_the_shapes_and_dtypes_of_the_kernels() -> None:
    op = get_op("wkv7", head_size=32, dtype=torch.bfloat16, arch="9.0a")
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 40, 3, 32, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(2, 40, 3, 32, dtype=torch.float32, device="cuda")
        ops = torch_ops("wkv7")
        slug = op.config.slug
        y, final, checkpoints = ops.forward(x, w, x, x, x, x, None, None, slug, True, True)
        grads = ops.backward(x, w, x, x, x, x, None, checkpoints, y, None, slug, False)
    assert (y.shape, y.dtype) == (x.shape, torch.bfloat16)
    assert (final.shape, final.dtype) == ((2, 3, 32, 32), torch.float32)
    assert checkpoints.shape == (2 * 40 // 16 + 2, 3, 32, 32)
    assert [grad.dtype for grad in grads[:2]] == [torch.bfloat16, torch.float32]


# torch's own tracer makes an instance of every autograd.Function, and scripts methods.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@on_each_device
@for_each_op
def test_compile_fullgraph_forward_and_backward_with_dynamic_length(device: str, name: str) -> None:
    op = small_op(device, name=name)
    torch._dynamo.reset()
    compilations = 0

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def layer(*x: torch.Tensor) -> torch.Tensor:
        r, w, k, v, bonus_or_a, *rest = x
        y, final = op(r * 2, w, k, v, normalize(bonus_or_a, dim=-1), *rest, True)
        assert final is not None
        return y.square().mean() + final.square().mean()

    for backend in (count, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for length in (5, 16, 33):
            given = leaves(device, length, name=name)
            loss = compiled(*given)
            grads = torch.autograd.grad(loss, given)
            expected = layer(*given)
            truth = torch.autograd.grad(expected, given)
            assert torch.allclose(loss, expected)
            for grad, right in zip(grads, truth, strict=True):
                assert relative_rms(grad, right) < 1e-6
    assert compilations == 1


@on_each_device
@for_each_op
def test_second_derivatives_are_refused_but_create_graph_is_not(device: str, name: str) -> None:
    given = leaves(device, name=name)
    y, _ = small_op(device, name=name)(*given)
    (first,) = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: second derivatives are not supported"):
        first.sum().backward()


@on_each_device
@for_each_op
def test_autocast_converts_to_the_operators_dtype_but_keeps_w_and_u_in_float32(
    device: str, name: str
) -> None:
    """Under autocast any floating tokens are taken; gradients come back in their own dtypes."""
    op = small_op(device, torch.bfloat16, name)
    given = leaves(device, name=name)
    call = random_call(2, 21, 2, 32, op=name)
    call.tokens = dict(zip(call.tokens, (x.detach().cpu() for x in given), strict=False))
    call.initial_state = given[-1].detach().cpu()
    call.w_dtype = torch.float32
    truth = reference(op, call.rounded(op), gradients=False)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, final = op(*given, output_final_state=True)
    assert final is not None
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert relative_rms(y, truth["y"]) < 4e-3
    assert relative_rms(final, truth["final_state"]) < 1e-5
    y.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in given)


def test_saved_tensors_are_only_made_for_gradients() -> None:
    op = small_op("cpu")
    given = leaves("cpu")
    with torch.no_grad():
        y, _ = op(*given)
    assert y.grad_fn is None
    y, final = op(*given[:6])
    assert y.grad_fn is not None
    assert final is None


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    op, given = small_op("cpu"), leaves("cpu")
    plain = torch.autograd.grad(op(*given)[0].sum(), given)
    again = torch.autograd.grad(
        checkpoint(lambda *x: op(*x)[0], *given, use_reentrant=False).sum(), given
    )
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@for_each_op
def test_a_cuda_graph_replays_forward_and_backward(name: str) -> None:
    op, given = small_op("cuda", name=name), leaves("cuda", name=name)
    dy = torch.randn_like(given[0])

    def work() -> tuple[torch.Tensor, ...]:
        y, _ = op(*given)
        return (y.detach(), *torch.autograd.grad(y, given, dy))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for x, new in zip(given, leaves("cuda", name=name), strict=True):
            x.copy_(new)
    graph.replay()
    for one, other in zip(captured, work(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_what_is_not_loaded_raises_instead_of_building() -> None:
    op = get_op("wkv7", head_size=16, dtype=torch.float16, device="cuda", decay="log")
    x = torch.zeros(1, 1, 1, 16, dtype=torch.float16, device="cuda")
    with (
        pytest.raises(KernelMissingError, match=r"is not loaded, and .* op\.load\(\)"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        op(x, x, x, x, x, x)
    torch.cuda.synchronize()


@pytest.mark.gpu
@for_each_op
def test_work_goes_to_the_current_stream(name: str) -> None:
    op = small_op("cuda", name=name)
    call = random_call(2, 600, 2, 32, op=name).rounded(op)
    expected = run(op, call, "cuda")
    big = torch.randn(1 << 27, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tokens = {}
        for argument, x in call.tokens.items():
            late = torch.full_like(x, float("nan"), device="cuda")
            # The right values come only after this stream's earlier work.
            for _ in range(3):
                big.mul_(1.0)
            tokens[argument] = late.copy_(x.cuda())
        assert call.initial_state is not None
        y, _ = op(**tokens, initial_state=call.initial_state.cuda())
    side.synchronize()
    assert torch.equal(y, expected["y"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@for_each_op
def test_a_second_device_is_used_where_the_tensors_are(name: str) -> None:
    op = small_op("cuda", name=name)
    call = random_call(2, 40, 2, 32, op=name).rounded(op)
    first, second = run(op, call, "cuda:0"), run(op, call, "cuda:1")
    assert torch.cuda.current_device() == 0
    for result, value in first.items():
        assert second[result].device.index == 1
        assert torch.equal(value.cpu(), second[result].cpu())
