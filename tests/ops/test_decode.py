"""The serving operators: against the reference, in place, on slots, and through torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from comparing import (
    DECODE_OPS,
    TOLERANCES,
    relative_rms,
    run_step,
)
from rwkv_jit import ServingOp, serving
from rwkv_jit.errors import ArgumentError, ConfigError
from rwkv_jit.ops import SPECS
from rwkv_jit.serving_launch import launcher, registered
from serving import (
    Tokens,
    draw,
    for_each_decay,
    for_each_empty_shape,
    for_each_size,
    for_each_state,
    in_reference_mode,
    indices,
    on_each_device,
    op_for,
    right_results,
    some,
)

for_each_op = pytest.mark.parametrize("name", DECODE_OPS)


def assert_right(
    op: ServingOp, tokens: Tokens, state: torch.Tensor, slots: torch.Tensor | None
) -> None:
    """y and the pool against the float64 recurrence."""
    *results, pool = right_results(op, tokens, state, slots)
    given = run_step(op, *tokens, state, slots)
    rounded = TOLERANCES[op.config.state_dtype][0]
    # A state of 16 bits is rounded after each token, and y is made of it.
    steps = tokens[0].shape[1] if rounded > 1e-4 else 1
    assert relative_rms(state, pool) < rounded * steps
    bound = max(TOLERANCES[op.config.dtype][0], rounded * steps)
    assert relative_rms(given, torch.cat(results, -1)) < bound


SIZES = [
    ("fp32", 16), ("fp32", 32), ("fp32", 64), ("fp32", 128), ("fp32", 256),
    ("bf16", 64), ("bf16", 128), ("fp16", 32),
]  # fmt: skip


@on_each_device
@for_each_size(DECODE_OPS, SIZES)
def test_results_and_states_match_the_reference(
    device: str, name: str, dtype: str, size: int
) -> None:
    op = op_for(name, device, dtype, size)
    for length in (1, 3, 8, 17):
        tokens, state = draw(op, device, 3, length, 2, slots=5)
        assert_right(op, tokens, state, indices([4, 0, 2], device))


@pytest.mark.parametrize("name", ["wkv6_decode", "wkv7_decode"])
@pytest.mark.parametrize(
    ("dtype", "size"), [("fp32", 8), ("fp32", 40), ("fp32", 200), ("fp64", 24)]
)
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_every_multiple_of_eight_is_a_head_size_on_a_cpu(
    name: str, dtype: str, size: int, layout: str
) -> None:
    op = op_for(name, "cpu", dtype, size, state_layout=layout)
    assert_right(op, *draw(op, "cpu", 2, 2, 2, slots=2), None)


@on_each_device
@for_each_op
@for_each_state
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_state_layouts_and_dtypes(device: str, name: str, state_dtype: str, layout: str) -> None:
    op = op_for(name, device, "bf16", 64, state_dtype=state_dtype, state_layout=layout)
    for rows in (2, 150):
        tokens, state = draw(op, device, rows, 2, 2, slots=rows)
        assert_right(op, tokens, state, None)


@on_each_device
@for_each_decay(DECODE_OPS)
def test_every_decay_and_w_in_float32(device: str, name: str, decay: str) -> None:
    op = op_for(name, device, "bf16", decay=decay)
    tokens, state = draw(op, device, 2, 2, 2, slots=2)
    tokens[1] = tokens[1].float()
    assert_right(op, tokens, state, None)


@on_each_device
@for_each_op
@for_each_state
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_tokens_at_once_and_one_by_one_give_the_same_bits(
    device: str, name: str, state_dtype: str, layout: str
) -> None:
    op = op_for(name, device, "bf16", 64, state_dtype=state_dtype, state_layout=layout)
    tokens, state = draw(op, device, 3, 11, 2, slots=3)
    other = state.clone()
    together = run_step(op, *tokens, state)
    alone = [run_step(op, *some(tokens, slice(t, t + 1)), other) for t in range(11)]
    assert torch.equal(torch.cat(alone, 1), together)
    assert torch.equal(other, state)


@on_each_device
@for_each_op
@pytest.mark.parametrize("size", [64, 128])
def test_a_row_does_not_depend_on_the_others_nor_on_their_number(
    device: str, name: str, size: int
) -> None:
    op = op_for(name, device, "bf16", size)
    tokens, state = draw(op, device, 300, 2, 3, slots=300)
    alone = state[7:8].clone()
    together = run_step(op, *tokens, state)
    one = run_step(op, *some(tokens, slice(None), slice(7, 8)), alone)
    assert torch.equal(one, together[7:8])
    assert torch.equal(alone, state[7:8])


@on_each_device
@for_each_op
def test_a_skipped_row_gives_zeros_and_leaves_every_state_as_it_is(device: str, name: str) -> None:
    op = op_for(name, device, "bf16", 64)
    tokens, state = draw(op, device, 4, 3, 2, slots=6)
    before = state.clone()
    y = run_step(op, *tokens, state, indices([-1, 5, -1, 0], device))
    assert not y[[0, 2]].any()
    assert y[[1, 3]].any()
    assert torch.equal(state[1:5], before[1:5])
    expected = before[[5, 0]].contiguous()
    run_step(op, *some(tokens, slice(None), [1, 3]), expected)
    assert torch.equal(state[[5, 0]], expected)


@for_each_op
@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ([0, 3], r"state_indices\[1\] is 3, but state has 3 slots; choose from 0 to 2, or -1"),
        ([-2, 0], r"state_indices\[0\] is -2, but state has 3 slots"),
        ([2, 2], r"state_indices has slot 2 twice, in rows 0 and 1; a slot serves one row"),
    ],
)
def test_bad_indices_are_refused_on_a_cpu_before_anything_changes(
    name: str, slots: list[int], said: str
) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 2, 1, 2, slots=3)
    before = state.clone()
    for _ in range(2):  # the second call takes the short way
        with pytest.raises(ArgumentError, match=f"{name}: {said}"):
            run_step(op, *tokens, state, indices(slots, "cpu"))
    assert torch.equal(state, before)


@pytest.mark.gpu
@for_each_op
def test_an_index_out_of_range_on_a_gpu_writes_nowhere_else(name: str) -> None:
    op = op_for(name, "cuda", "bf16", 64)
    tokens, state = draw(op, "cuda", 4, 2, 2, slots=12)
    before = state.clone()
    pool = state[4:8]
    y = run_step(op, *tokens, pool, indices([-3, 4, 1 << 30, 2], "cuda"))
    assert not y[:3].any()
    assert y[3].any()
    untouched = [*range(6), *range(7, 12)]
    assert torch.equal(state[untouched], before[untouched])


@pytest.mark.gpu
@for_each_op
def test_bad_indices_are_refused_on_a_gpu_where_it_may_be_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cuda")
    monkeypatch.setattr(launcher(op.config.slug), "_sees_values", True)
    tokens, state = draw(op, "cuda", 2, 1, 2, slots=3)
    with pytest.raises(ArgumentError, match="slot 1 twice"):
        run_step(op, *tokens, state, indices([1, 1], "cuda"))


@on_each_device
@for_each_op
def test_tensors_that_do_not_fit_are_refused(device: str, name: str) -> None:
    op = op_for(name, device)
    tokens, state = draw(op, device, 2, 1, 2, slots=3)
    run_step(op, *tokens, state)
    with pytest.raises(ArgumentError, match="state has 1 slots, but the batch has B=2; give every"):
        run_step(op, *tokens, state[:1])
    with pytest.raises(ArgumentError, match="state is advanced in place and must be contiguous"):
        run_step(op, *tokens, state.mT)
    with pytest.raises(ArgumentError, match="state is bfloat16, but must be float32"):
        run_step(op, *tokens, state.bfloat16())
    with pytest.raises(ArgumentError, match="state_indices is int64, but must be int32"):
        run_step(op, *tokens, state, torch.arange(2, device=device))
    with pytest.raises(ArgumentError, match=r"state_indices has B=1 in \[B\], but r has B=2"):
        run_step(op, *tokens, state, indices([0], device))
    with pytest.raises(ArgumentError, match="state is None, but only optional tensors may be"):
        run_step(op, *tokens)
    with pytest.raises(ArgumentError, match="slots is not an argument; it takes r, w, k, v"):
        run_step(op, *tokens, state, slots=None)
    with pytest.raises(ArgumentError, match="k has H=1"):
        run_step(op, *tokens[:2], tokens[2][:, :, :1], *tokens[3:], state)


@for_each_op
def test_gradients_are_refused_where_they_would_be_wanted(name: str) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 2, 1, 2, slots=2)
    run_step(op, *tokens, state)
    tokens[0].requires_grad_()
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"r requires grad, .* torch.no_grad\(\), or use"):
            run_step(op, *tokens, state)
    with torch.no_grad():
        assert not run_step(op, *tokens, state).requires_grad
    with torch.inference_mode():
        run_step(op, *tokens, state)
        run_step(op, *tokens, torch.zeros_like(state))


@for_each_op
def test_a_chunk_length_or_rounded_checkpoints_have_no_kernel(name: str) -> None:
    with pytest.raises(ConfigError, match="chunk_length=32 is not supported"):
        op_for(name, "cpu", chunk_length=32)
    with pytest.raises(ConfigError, match="checkpoint_dtype=bf16 is not supported"):
        op_for(name, "cpu", checkpoint_dtype=torch.bfloat16)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    padded = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    padded[1:] = x.reshape(-1)
    return padded[1:].view(x.shape)


@on_each_device
@for_each_op
def test_any_strides_and_alignment_of_tokens_give_the_same(device: str, name: str) -> None:
    op = op_for(name, device, "bf16", 64)
    tokens, state = draw(op, device, 2, 3, 2, slots=2)
    pools = [state.clone() for _ in range(3)]
    plain = run_step(op, *tokens, pools[0])
    assert torch.equal(run_step(op, *(x.mT.contiguous().mT for x in tokens), pools[1]), plain)
    assert torch.equal(run_step(op, *map(misaligned, tokens), pools[2]), plain)
    assert torch.equal(pools[1], pools[0])
    assert torch.equal(pools[2], pools[0])


@on_each_device
def test_one_decay_of_all_channels_may_be_given_without_them(device: str) -> None:
    op = op_for("wkv5_decode", device)
    tokens, state = draw(op, device, 2, 1, 2, slots=2)
    other = state.clone()
    narrow = tokens[1][:, 0].clone()
    wide = narrow[:, None].expand(2, 32).contiguous()
    for _ in range(2):
        first = op(tokens[0], narrow, *tokens[2:], state)
        second = op(tokens[0], wide, *tokens[2:], other)
        assert torch.equal(first, second)


@on_each_device
@for_each_op
@for_each_empty_shape
def test_empty_dimensions_give_empty_results(
    device: str, name: str, shape: tuple[int, int, int]
) -> None:
    op = op_for(name, device)
    tokens, state = draw(op, device, *shape, slots=2)
    before = state.clone()
    assert run_step(op, *tokens, state).shape[:3] == shape
    assert torch.equal(state, before)


@for_each_op
def test_arguments_may_be_named(name: str) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 2, 1, 2, slots=2)
    other = state.clone()
    slots = indices([1, 0], "cpu")
    names = SPECS[name].parameters
    first = run_step(op, *tokens, state=state, state_indices=slots)
    second = run_step(op, **dict(zip(names, (*tokens, other, slots), strict=True)))
    assert torch.equal(first, second)
    assert torch.equal(state, other)


@for_each_op
def test_a_hundred_thousand_steps_stay_close_to_float64(name: str) -> None:
    """The decays reach from hardly any to a lot, and 64 drawn tokens come again and again."""
    op, exact = op_for(name, "cpu", "fp32", 16), op_for(name, "cpu", "fp64", 16)
    tokens, state = draw(op, "cpu", 1, 64, 2, slots=1)
    tokens[1] = torch.empty_like(tokens[1]).uniform_(-12, 0)
    doubles, truth = [x.double() for x in tokens], state.double()
    for step in range(0, 100_000, 64):
        y = run_step(op, *tokens, state)
        right = run_step(exact, *doubles, truth)
        if step % 6400 == 0:
            assert relative_rms(y, right) < 1e-4
    assert relative_rms(state, truth) < 1e-4


@on_each_device
@for_each_op
def test_opcheck_passes(device: str, name: str) -> None:
    op = op_for(name, device)
    tokens, state = draw(op, device, 2, 2, 2, slots=3)
    for slots in (None, indices([2, 0], device)):
        torch.library.opcheck(registered(name), (*tokens, state, slots, op.config.slug))


@on_each_device
@for_each_op
def test_compile_fullgraph_advances_the_state_with_any_number_of_rows(
    device: str, name: str
) -> None:
    op = op_for(name, device)
    compilations = 0

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def layer(r: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return run_step(op, r * 2, *rest) + 1

    for backend in (count, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for rows in (2, 3, 5):
            tokens, state = draw(op, device, rows, 3, 4, slots=7)
            other = state.clone()
            slots = indices([6, 0, -1, 2, 3][:rows], device)
            assert torch.equal(compiled(*tokens, state, slots), layer(*tokens, other, slots))
            assert torch.equal(state, other)
    assert compilations == 1


@on_each_device
@for_each_op
def test_modes_and_tracers_see_the_call(device: str, name: str) -> None:
    op = op_for(name, device)
    tokens, state = draw(op, device, 2, 1, 2, slots=2)
    expected = run_step(op, *tokens, state.clone())
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(run_step(op, *tokens, state.clone()), expected)
    assert f"rwkv_jit.{name}.default" in seen
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    graph = make_fx(functools.partial(run_step, op))(*tokens, state.clone())
    assert f"rwkv_jit.{name}.default" in graph.code
    assert torch.equal(graph(*tokens, state.clone()), expected)


@for_each_op
def test_an_eager_call_of_known_sizes_does_not_go_through_the_dispatcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 2, 1, 2, slots=2)
    slots = indices([1, 0], "cpu")
    run_step(op, *tokens, state, slots)
    monkeypatch.setattr(op, "_registered", None)
    run_step(op, *tokens, state, slots)
    run_step(op, *tokens, state, state_indices=slots)


@for_each_op
def test_a_misaligned_call_of_known_sizes_goes_through_the_dispatcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 2, 1, 2, slots=2)
    run_step(op, *tokens, state)
    for at in range(len(tokens)):
        with monkeypatch.context() as patch:
            patch.setattr(op, "_registered", None)
            run_step(op, *tokens, state)
            given = [misaligned(x) if i == at else x for i, x in enumerate(tokens)]
            with pytest.raises(TypeError, match="NoneType"):
                run_step(op, *given, state)


@for_each_op
def test_results_are_like_those_of_torch_where_it_lacks_the_short_way_to_make_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = op_for(name, "cpu", "bf16", 64)
    slow = ServingOp(quick.config)
    tokens, state = draw(quick, "cpu", 3, 2, 2, slots=3)
    pools = state, state.clone()
    quick(*tokens, state.clone())
    with monkeypatch.context() as patch:
        patch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
        slow(*tokens, state.clone())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            pair = [op(*tokens, pool) for op, pool in zip((quick, slow), pools, strict=True)]
        for y, other in zip(*(x if isinstance(x, tuple) else (x,) for x in pair), strict=True):
            assert torch.equal(y, other)
            assert y.stride() == other.stride() == torch.empty(y.shape).stride()
            assert y.is_inference() == other.is_inference() == (mode is torch.inference_mode)
            assert not y.requires_grad
    assert torch.equal(*pools)


def test_what_a_short_way_must_not_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's guards, and without them."""
    config = op_for("wkv7_decode", "cpu").config
    for guards in (serving._GUARDS, None):
        monkeypatch.setattr(serving, "_GUARDS", guards)
        op = ServingOp(config)
        tokens, state = draw(op, "cpu", 2, 1, 2, slots=2)
        tokens[0].requires_grad_()
        with torch.no_grad():
            for _ in range(3):
                op(*tokens, state)
        with pytest.raises(ArgumentError, match="r requires grad"):
            op(*tokens, state)
        tokens[0] = tokens[0].detach()
        seen = []

        class Watch(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                seen.append(func)  # noqa: B023
                return func(*args, **(kwargs or {}))

        op(*tokens, state)
        with Watch():
            op(*tokens, state)
        assert registered("wkv7_decode") in seen
        with pytest.raises(ArgumentError, match="k is float64, but must be float32"):
            op(*tokens[:2], tokens[2].double(), *tokens[3:], state)
        transposed = tokens[1].mT.contiguous().mT
        expected = op(*tokens, state.clone())
        assert torch.equal(op(tokens[0], transposed, *tokens[2:], state), expected)


@for_each_op
def test_autograd_sees_that_a_saved_state_was_advanced(name: str) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 2, 1, 2, slots=2)
    leaf = torch.ones_like(state, requires_grad=True)
    product = leaf * state
    for _ in range(2):
        run_step(op, *tokens, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@on_each_device
@for_each_op
def test_autocast_converts_tokens_and_never_the_state(device: str, name: str) -> None:
    op = op_for(name, device, "bf16")
    tokens, state = draw(op, device, 2, 1, 2, slots=2)
    other = state.clone()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = run_step(op, *(x.float() for x in tokens), state)
    assert relative_rms(y, run_step(op, *tokens, other)) < 1e-2
    assert relative_rms(state, other) < 1e-2


@for_each_op
def test_the_reference_mode_advances_the_same_states(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 3, 2, 2, slots=4)
    other, slots = state.clone(), indices([3, -1, 0], "cpu")
    slow = in_reference_mode(op, monkeypatch)
    for _ in range(2):
        assert (
            relative_rms(run_step(slow, *tokens, other, slots), run_step(op, *tokens, state, slots))
            < 1e-5
        )
        assert relative_rms(other, state) < 1e-5
    with pytest.raises(ArgumentError, match="slot 1 twice"):
        run_step(slow, *tokens, other, indices([1, 1, -1], "cpu"))


@for_each_op
def test_a_kernel_is_described_once_it_is_loaded(name: str) -> None:
    op = op_for(name, "cpu")
    op.load()
    assert set(op.info()["kernels"]) == {"decode"}
    assert repr(op) == f"<rwkv_jit.ServingOp {op.config.slug}>"


@pytest.mark.gpu
@for_each_op
def test_a_cuda_graph_advances_the_states_at_each_replay(name: str) -> None:
    op = op_for(name, "cuda", "bf16", 64)
    tokens, state = draw(op, "cuda", 3, 2, 2, slots=5)
    slots = indices([4, 1, 0], "cuda")
    other = state.clone()
    run_step(op, *tokens, state.clone(), slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_step(op, *tokens, state, slots)
    for new in ([4, 1, 0], [2, -1, 4], [1, 2, 3]):
        fresh, _ = draw(op, "cuda", 3, 2, 2, slots=5)
        for x, value in zip(tokens, fresh, strict=True):
            x.copy_(value)
        slots.copy_(indices(new, "cuda"))
        graph.replay()
        assert torch.equal(run_step(op, *tokens, other, slots), y)
        assert torch.equal(other, state)


@pytest.mark.gpu
@for_each_op
def test_work_goes_to_the_current_stream(name: str) -> None:
    op = op_for(name, "cuda", "bf16", 64)
    tokens, state = draw(op, "cuda", 3, 2, 2, slots=3)
    expected = run_step(op, *tokens, state.clone())
    big, late = torch.randn(1 << 27, device="cuda"), torch.full_like(state, float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            big.mul_(1.0)
        late.copy_(state)
        y = run_step(op, *tokens, late)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@for_each_op
def test_a_second_device_is_used_where_the_tensors_are(name: str) -> None:
    op = op_for(name, "cuda", "bf16", 64)
    tokens, state = draw(op, "cuda", 3, 1, 2, slots=3)
    there = [x.to("cuda:1") for x in (*tokens, state)]
    for _ in range(3):
        expected, y = run_step(op, *tokens, state), run_step(op, *there)
        assert y.device.index == 1
        assert torch.equal(y.cpu(), expected.cpu())
    assert torch.equal(there[-1].cpu(), state.cpu())
    assert torch.cuda.current_device() == 0
