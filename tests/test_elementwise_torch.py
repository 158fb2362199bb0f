"""What torch asks of the steps around the recurrence: opcheck, compile, autocast, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comparing import relative_rms
from elementwise import OPS, SPECS, draw, make_op, options_of, outputs_of, run, truth
from rwkv_jit import op as op_module
from rwkv_jit.op import ElementwiseOp
from rwkv_jit.settings import Settings

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
for_each_op = pytest.mark.parametrize("name", OPS)


@on_each_device
@for_each_op
def test_opcheck_passes_for_both_registered_ops(device: str, name: str) -> None:
    op, spec = make_op(name, torch.float32, device), SPECS[name]
    tensors = draw(name, torch.float32, device)
    forward = getattr(torch.ops.rwkv_jit, f"{name}_forward").default
    backward = getattr(torch.ops.rwkv_jit, f"{name}_backward").default
    scalars = tuple(spec.called.scalars.values())
    inputs = [tensors.get(tensor.name) for tensor in spec.called.inputs]
    flags = [True] * len(spec.called.optional_outputs)
    call = (*inputs, *scalars, op.config.slug, *flags)
    torch.library.opcheck(forward, call)
    outputs = outputs_of(forward(*call))
    values = {**tensors}
    for tensor, y in zip(spec.called.outputs, outputs, strict=True):
        values[f"d{tensor.name}"] = torch.randn_like(y)
    entry = spec.entries["backward"]
    inputs = [values.get(tensor.name) for tensor in entry.inputs]
    flags = [True] * len(entry.optional_outputs)
    torch.library.opcheck(backward, (*inputs, *scalars, op.config.slug, *flags))


# torch's own tracer makes an instance of every autograd.Function, and scripts methods.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@on_each_device
@for_each_op
def test_compile_fullgraph_forward_and_backward_with_dynamic_length(device: str, name: str) -> None:
    op = make_op(name, torch.float32, device)
    compilations = 0

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def layer(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = outputs_of(op(**tensors, **options_of(name, None)))
        return torch.stack([y.square().mean() for y in outputs]).sum()

    for backend in (count, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for length in (5, 16, 33):
            tensors = draw(name, torch.float32, device)
            given = {
                n: (x[:, :length] if x.dim() > 2 else x).clone().requires_grad_()
                for n, x in tensors.items()
            }
            loss, expected = compiled(given), layer(given)
            assert torch.allclose(loss, expected)
            grads = torch.autograd.grad(loss, list(given.values()))
            right = torch.autograd.grad(expected, list(given.values()))
            for one, other in zip(grads, right, strict=True):
                assert relative_rms(one, other) < 1e-6
    assert compilations == 1


@on_each_device
@for_each_op
def test_autocast_converts_tokens_but_keeps_parameters_in_float32(device: str, name: str) -> None:
    op = make_op(name, torch.bfloat16, device)
    tensors = draw(name, torch.float32, device)
    rounded = draw(name, torch.bfloat16, device, parameters=torch.float32)
    for label, x in tensors.items():
        rounded[label] = x.to(rounded[label].dtype)
    right, _ = truth(name, rounded, torch.bfloat16)
    leaves = {label: x.requires_grad_() for label, x in tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = outputs_of(op(**leaves, **options_of(name, None)))
    for y, expected in zip(outputs, right.outputs, strict=True):
        assert y.dtype == torch.bfloat16
        assert relative_rms(y, expected) < 2e-3
    torch.stack([y.float().sum() for y in outputs]).sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves.values())


@on_each_device
@for_each_op
def test_second_derivatives_are_refused_but_create_graph_is_not(device: str, name: str) -> None:
    op = make_op(name, torch.float32, device)
    leaves = {n: x.requires_grad_() for n, x in draw(name, torch.float32, device).items()}
    y = outputs_of(op(**leaves))[0]
    first = torch.autograd.grad(y.square().sum(), next(iter(leaves.values())), create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: second derivatives are not supported"):
        first[0].sum().backward()


@for_each_op
def test_reference_mode_runs_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = make_op(name, torch.float32, "cpu")
    monkeypatch.setattr(op_module, "current_settings", lambda: Settings(mode="reference"))
    plain = ElementwiseOp(op.config)
    tensors = draw(name, torch.float32, "cpu")
    _, given = truth(name, tensors, torch.float32)
    ours, formula = run(op, tensors, given), run(plain, tensors, given)
    for one, other in zip(ours.outputs, formula.outputs, strict=True):
        assert other.dtype == torch.float32
        assert relative_rms(one, other) < 1e-6
    for label, grad in ours.gradients.items():
        assert relative_rms(grad, formula.gradients[label]) < 5e-6, label


@for_each_op
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    op = make_op(name, torch.float32, "cpu")
    leaves = {n: x.requires_grad_() for n, x in draw(name, torch.float32, "cpu").items()}

    def layer(*values: torch.Tensor) -> torch.Tensor:
        outputs = outputs_of(op(**dict(zip(leaves, values, strict=True))))
        return torch.stack([y.square().sum() for y in outputs]).sum()

    plain = torch.autograd.grad(layer(*leaves.values()), list(leaves.values()))
    saved = checkpoint(layer, *leaves.values(), use_reentrant=False)
    again = torch.autograd.grad(saved, list(leaves.values()))
    assert all(map(torch.equal, plain, again))


@pytest.mark.gpu
@for_each_op
def test_a_cuda_graph_on_a_side_stream_replays_forward_and_backward(name: str) -> None:
    op = make_op(name, torch.bfloat16, "cuda")
    leaves = {n: x.requires_grad_() for n, x in draw(name, torch.bfloat16, "cuda").items()}
    with torch.no_grad():
        dys = [torch.randn_like(y) for y in outputs_of(op(**leaves))]

    def work() -> list[torch.Tensor]:
        outputs = outputs_of(op(**leaves))
        grads = torch.autograd.grad(outputs, list(leaves.values()), dys)
        # What is kept must not keep this stream's autograd graph.
        return [*(y.detach() for y in outputs), *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for x, new in zip(
            leaves.values(), draw(name, torch.bfloat16, "cuda").values(), strict=True
        ):
            x.copy_(new)
    graph.replay()
    assert all(map(torch.equal, captured, work()))
