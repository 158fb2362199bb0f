"""Prefill: against the reference and the forward, packed and padded, in place, through torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from comparing import PREFILL_OPS, TOLERANCES, relative_rms
from rwkv_jit import Op, ServingOp, get_op
from rwkv_jit.errors import ArgumentError, ConfigError
from rwkv_jit.launch import TORCH_DTYPES
from rwkv_jit.serving_launch import launcher, registered
from serving import (
    Tokens,
    draw,
    for_each_decay,
    for_each_empty_shape,
    for_each_size,
    in_reference_mode,
    indices,
    on_each_device,
    op_for,
    right_results,
    some,
)

for_each_op = pytest.mark.parametrize("name", PREFILL_OPS)
# On a GPU those of tensor cores and those that go token by token.
for_each_kind = pytest.mark.parametrize(("dtype", "size"), [("bf16", 64), ("fp32", 32)])
# Empty ones, one token, around a chunk of 16, around a span of 64, and several spans.
ADVERSARIAL = [0, 1, 15, 16, 17, 0, 63, 64, 65, 130, 2, 0]


def bounds_of(lengths: list[int], device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def forward_of(op: ServingOp, device: str) -> Op:
    """The operator for training that computes the same."""
    config = op.config
    found = get_op(
        config.op.partition("_")[0],
        head_size=config.head_size,
        dtype=TORCH_DTYPES[config.dtype],
        device=device,
        decay=config.decay,
        state_dtype=TORCH_DTYPES[config.state_dtype],
        state_layout=config.state_layout,
    )
    assert isinstance(found, Op)
    return found


def packed_call(
    op: ServingOp,
    device: str,
    lengths: list[int],
    *,
    heads: int = 2,
    beyond: int = 0,
    more: int = 0,
) -> tuple[Tokens, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, a pool with `more` slots than sequences, bounds and slots in no order."""
    slots = len(lengths) + more
    tokens, state = draw(op, device, 1, sum(lengths) + beyond, heads, slots)
    order = torch.randperm(slots)[: len(lengths)].tolist()
    return tokens, state, bounds_of(lengths, device), indices(order, device)


def assert_right(
    op: ServingOp,
    tokens: Tokens,
    state: torch.Tensor,
    bounds: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """y and the pool against the float64 recurrence."""
    y, pool = right_results(op, tokens, state, bounds, slots)
    given = op(*tokens, state, bounds, slots)
    limit = TOLERANCES[op.config.rounded_to][0]
    assert relative_rms(given, y) < limit
    assert relative_rms(state, pool) < max(limit, TOLERANCES[op.config.state_dtype][0])


SIZES = [("fp32", 32), ("fp32", 256), ("bf16", 64), ("bf16", 128), ("fp16", 16)]


@on_each_device
@for_each_size(PREFILL_OPS, SIZES)
def test_results_and_states_match_the_reference(
    device: str, name: str, dtype: str, size: int
) -> None:
    op = op_for(name, device, dtype, size)
    tokens, state = draw(op, device, 3, 70, 2, slots=5)
    assert_right(op, tokens, state, None, indices([4, 0, 2], device))
    assert_right(op, *packed_call(op, device, ADVERSARIAL, beyond=9, more=3))


@pytest.mark.gpu
def test_results_and_states_match_the_reference_in_tf32() -> None:
    op = get_op("wkv7_prefill", head_size=64, dtype=torch.float32, device="cuda", precision="tf32")
    assert op.config.precision == "tf32"
    assert_right(op, *packed_call(op, "cuda", ADVERSARIAL, beyond=9, more=3))


@on_each_device
@for_each_op
@pytest.mark.parametrize(
    ("dtype", "size", "state_dtype", "layout"),
    [("bf16", 64, "fp32", "vk"), ("bf16", 64, "bf16", "kv"), ("fp32", 32, "fp16", "vk")],
)
def test_prefill_gives_the_bits_of_the_forward(
    device: str, name: str, dtype: str, size: int, state_dtype: str, layout: str
) -> None:
    op = op_for(name, device, dtype, size, state_dtype=state_dtype, state_layout=layout)
    tokens, state, bounds, slots = packed_call(op, device, ADVERSARIAL)
    y, final = forward_of(op, device)(
        *tokens,
        initial_state=state[slots.long()],
        output_final_state=True,
        cu_seqlens=bounds,
    )
    assert torch.equal(op(*tokens, state, bounds, slots), y)
    assert final is not None
    assert torch.equal(state[slots.long()], final)


@on_each_device
@for_each_decay(PREFILL_OPS)
def test_every_decay_and_w_in_float32(device: str, name: str, decay: str) -> None:
    op = op_for(name, device, "bf16", 64, decay=decay)
    tokens, *rest = packed_call(op, device, [20, 50])
    tokens[1] = tokens[1].float()
    assert_right(op, tokens, *rest)


@on_each_device
@for_each_kind
@for_each_op
def test_a_sequence_does_not_depend_on_the_others_nor_on_their_number(
    device: str, name: str, dtype: str, size: int
) -> None:
    """There are more than a GPU runs at once, so that the longest come first."""
    op = op_for(name, device, dtype, size)
    lengths = [int(x) for x in torch.randint(0, 90, (300 if device == "cuda" else 12,))]
    lengths[7] = 77
    heads = 8 if device == "cuda" else 2
    tokens, state, bounds, slots = packed_call(op, device, lengths, heads=heads)
    begin = sum(lengths[:7])
    before = state.clone()
    together = op(*tokens, state, bounds, slots)
    y, _ = forward_of(op, device)(*tokens, initial_state=before[slots.long()], cu_seqlens=bounds)
    assert torch.equal(together, y)
    alone = before[slots[7].item()][None]
    one = op(*some(tokens, slice(begin, begin + 77)), alone)
    assert torch.equal(one, together[:, begin : begin + 77])
    assert torch.equal(alone[0], state[slots[7].item()])


@on_each_device
@for_each_op
def test_empty_and_skipped_sequences_leave_every_state_as_it_is(device: str, name: str) -> None:
    op = op_for(name, device, "bf16", 64)
    tokens, state, bounds, _ = packed_call(op, device, [20, 0, 33, 70], beyond=40, more=2)
    before = state.clone()
    y = op(*tokens, state, bounds, indices([-1, 3, 1, -1], device))
    assert not y[:, :20].any()
    assert not y[:, 53:].any()
    assert y[:, 20:53].any()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(state[others], before[others])
    assert not torch.equal(state[1], before[1])


@on_each_device
@for_each_op
@for_each_kind
def test_tokens_behind_the_last_bound_give_zeros_whatever_they_hold(
    device: str, name: str, dtype: str, size: int
) -> None:
    op = op_for(name, device, dtype, size)
    tokens, state, bounds, slots = packed_call(op, device, [17, 40], beyond=500)
    other = state.clone()
    plain = op(*some(tokens, slice(57)), other, bounds, slots)
    for x in tokens:
        if x.dim() == 4:
            x[:, 57:] = torch.nan
    y = op(*tokens, state, bounds, slots)
    assert torch.equal(y[:, :57], plain)
    assert not y[:, 57:].any()
    assert torch.equal(state, other)
    nobody = op(*tokens, state, bounds_of([], device), indices([], device))
    assert not nobody.any()
    assert torch.equal(state, other)


@on_each_device
@for_each_op
def test_absent_sequences_change_nothing(device: str, name: str) -> None:
    op = op_for(name, device, "bf16", 64)
    tokens, state, bounds, slots = packed_call(op, device, [30, 5])
    other = state.clone()
    expected = op(*tokens, other, bounds, slots)
    padded = torch.cat([bounds, bounds[-1:].expand(6)])
    given = op(*tokens, state, padded, torch.cat([slots, indices([-1] * 6, device)]))
    assert torch.equal(given, expected)
    assert torch.equal(state, other)


@on_each_device
@for_each_op
@for_each_kind
def test_a_prompt_may_come_in_parts(device: str, name: str, dtype: str, size: int) -> None:
    """On tensor cores parts of whole chunks give the same bits."""
    op = op_for(name, device, dtype, size)
    tokens, state = draw(op, device, 1, 150, 2, slots=1)
    other = state.clone()
    whole = op(*tokens, state)
    cuts = [(0, 48), (48, 64), (64, 150)]
    parts = [op(*some(tokens, slice(a, b)), other) for a, b in cuts]
    if dtype == "bf16" and device == "cuda":
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(other, state)
    limit = TOLERANCES[dtype][0]
    assert relative_rms(torch.cat(parts, 1), whole) < limit
    assert relative_rms(other, state) < limit


@on_each_device
@for_each_op
def test_decode_goes_on_where_prefill_ended(device: str, name: str) -> None:
    op = op_for(name, device, "fp32", 32)
    decode = op_for(name.replace("prefill", "decode"), device, "fp32", 32)
    tokens, state = draw(op, device, 2, 40, 2, slots=2)
    other = state.clone()
    whole = op(*tokens, state)
    first = op(*some(tokens, slice(35)), other)
    last = decode(*some(tokens, slice(35, None)), other)
    assert relative_rms(torch.cat([first, last], 1), whole) < 1e-5
    assert relative_rms(other, state) < 1e-5


@for_each_op
@pytest.mark.parametrize(
    ("bounds", "slots", "said"),
    [
        ([0, 2, 5], [0, 3], r"state_indices\[1\] is 3, but state has 3 slots; choose from 0 to 2"),
        ([0, 2, 5], [2, 2], r"state_indices has slot 2 twice, in rows 0 and 1"),
        ([0, 2, 6], [0, 1], r"cu_seqlens=\[0, 2, 6\] must rise from 0 to at most T=5"),
        ([0, 3, 2], [0, 1], r"cu_seqlens=\[0, 3, 2\] must rise from 0 to at most T=5"),
        ([1, 3, 5], [0, 1], r"cu_seqlens=\[1, 3, 5\] must rise from 0 to at most T=5"),
    ],
)
def test_bad_values_are_refused_on_a_cpu_before_anything_changes(
    name: str, bounds: list[int], slots: list[int], said: str
) -> None:
    op = op_for(name, "cpu")
    tokens, state, good, _ = packed_call(op, "cpu", [2, 3], more=1)
    op(*tokens, state, good, indices([0, 1], "cpu"))
    before = state.clone()
    with pytest.raises(ArgumentError, match=f"{name}: {said}"):
        op(*tokens, state, indices(bounds, "cpu"), indices(slots, "cpu"))
    assert torch.equal(state, before)


@on_each_device
@for_each_op
def test_tensors_that_do_not_fit_are_refused(device: str, name: str) -> None:
    op = op_for(name, device)
    tokens, state, bounds, slots = packed_call(op, device, [2, 3])
    op(*tokens, state, bounds, slots)
    with pytest.raises(ArgumentError, match="1 slots, but cu_seqlens has S=2; give every sequence"):
        op(*tokens, state[:1], bounds)
    with pytest.raises(ArgumentError, match=r"state_indices has S=1 in \[S\], but cu_seqlens"):
        op(*tokens, state, bounds, slots[:1])
    with pytest.raises(ArgumentError, match="state is advanced in place and must be contiguous"):
        op(*tokens, state.mT, bounds, slots)
    with pytest.raises(ArgumentError, match="cu_seqlens is float32, but must be int32 or int64"):
        op(*tokens, state, bounds.float(), slots)
    with pytest.raises(ArgumentError, match="initial_state is not an argument; it takes r, w, k"):
        op(*tokens, state, initial_state=None)
    tokens[0].requires_grad_()
    with pytest.raises(ArgumentError, match="r requires grad, but serving has no gradients"):
        op(*tokens, state, bounds, slots)
    with pytest.raises(ConfigError, match="chunk_length=32 is not supported"):
        op_for(name, device, chunk_length=32)


@pytest.mark.gpu
@for_each_op
@for_each_kind
def test_bad_values_on_a_gpu_write_nowhere_else(name: str, dtype: str, size: int) -> None:
    op = op_for(name, "cuda", dtype, size)
    tokens, state, bounds, _ = packed_call(op, "cuda", [20, 20, 20, 20], more=8)
    before = state.clone()
    pool = state[4:8]
    y = op(*tokens, pool, bounds, indices([-3, 4, 1 << 30, 2], "cuda"))
    assert not y[:, :60].any()
    assert y[:, 60:].any()
    untouched = [*range(6), *range(7, 12)]
    assert torch.equal(state[untouched], before[untouched])
    wild = torch.tensor([-5, 1 << 40, 3, -7, 1 << 62], device="cuda")
    op(*tokens, pool, wild, indices([0, 1, 2, 3], "cuda"))
    torch.cuda.synchronize()
    outside = [*range(4), *range(8, 12)]
    assert torch.equal(state[outside], before[outside])


@pytest.mark.gpu
@for_each_op
def test_bad_values_are_refused_on_a_gpu_where_it_may_be_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cuda")
    monkeypatch.setattr(launcher(op.config.slug), "_sees_values", True)
    tokens, state, bounds, _ = packed_call(op, "cuda", [2, 3], more=1)
    with pytest.raises(ArgumentError, match="slot 1 twice"):
        op(*tokens, state, bounds, indices([1, 1], "cuda"))
    with pytest.raises(ArgumentError, match="must rise from 0 to at most T=5"):
        op(*tokens, state, bounds.flip(0), indices([0, 1], "cuda"))


@on_each_device
@for_each_op
def test_sixty_four_bit_bounds_strides_and_rectangles_give_the_same(device: str, name: str) -> None:
    op = op_for(name, device, "bf16", 64)
    tokens, state, bounds, slots = packed_call(op, device, [21, 21, 21])
    pools = [state.clone() for _ in range(3)]
    plain = op(*tokens, state, bounds, slots)
    assert torch.equal(op(*tokens, pools[0], bounds.long(), state_indices=slots), plain)
    strided = [x.mT.contiguous().mT for x in tokens]
    assert torch.equal(op(*strided, pools[1], bounds, slots), plain)
    rows = [x.view(3, 21, *x.shape[2:]) if x.dim() == 4 else x for x in tokens]
    assert torch.equal(op(*rows, pools[2], state_indices=slots).view_as(plain), plain)
    for pool in pools:
        assert torch.equal(pool, state)


@on_each_device
@for_each_op
@for_each_empty_shape
def test_empty_dimensions_give_empty_results(
    device: str, name: str, shape: tuple[int, int, int]
) -> None:
    op = op_for(name, device)
    tokens, state = draw(op, device, *shape, slots=2)
    before = state.clone()
    assert op(*tokens, state).shape == (*shape, 32)
    assert torch.equal(state, before)


@on_each_device
@for_each_op
def test_opcheck_passes(device: str, name: str) -> None:
    op = op_for(name, device)
    tokens, state, bounds, slots = packed_call(op, device, [2, 0, 3], beyond=2)
    for rest in ((bounds, slots), (bounds, None), (None, slots[:1])):
        torch.library.opcheck(registered(name), (*tokens, state, *rest, op.config.slug))


@on_each_device
@for_each_op
def test_compile_fullgraph_advances_the_states_with_any_number_of_sequences(
    device: str, name: str
) -> None:
    op = op_for(name, device)

    def layer(r: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return op(r * 2, *rest) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([4, 9], [3, 7, 5], [6, 2, 0, 11, 8]):
        tokens, state, bounds, slots = packed_call(op, device, lengths, beyond=2)
        other = state.clone()
        given = compiled(*tokens, state, bounds, slots)
        assert torch.equal(given, layer(*tokens, other, bounds, slots))
        assert torch.equal(state, other)


@for_each_op
def test_an_eager_packed_call_of_known_sizes_does_not_go_through_the_dispatcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cpu")
    tokens, state, bounds, slots = packed_call(op, "cpu", [2, 3])
    op(*tokens, state, bounds, slots)
    monkeypatch.setattr(op, "_registered", None)
    op(*tokens, state, bounds, slots)
    op(*tokens, state, bounds, state_indices=slots)


@for_each_op
def test_bounds_and_slots_of_the_same_shape_are_told_apart(name: str) -> None:
    op = op_for(name, "cpu")
    tokens, state = draw(op, "cpu", 1, 6, 2, slots=3)
    pools = [state.clone() for _ in range(2)]
    one = indices([0], "cpu")
    assert op(*tokens, state, None, one).any()
    assert not op(*tokens, pools[0], one).any()
    assert torch.equal(pools[0], pools[1])


@for_each_op
def test_the_reference_mode_advances_the_same_states(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = op_for(name, "cpu")
    tokens, state, bounds, _ = packed_call(op, "cpu", [3, 0, 6, 2], beyond=3, more=1)
    other, slots = state.clone(), indices([3, 4, -1, 0], "cpu")
    slow = in_reference_mode(op, monkeypatch)
    for _ in range(2):
        given, right = slow(*tokens, other, bounds, slots), op(*tokens, state, bounds, slots)
        assert relative_rms(given, right) < 1e-5
        assert relative_rms(other, state) < 1e-5


@pytest.mark.gpu
@for_each_kind
@for_each_op
def test_one_cuda_graph_serves_changing_batches(name: str, dtype: str, size: int) -> None:
    """Buffers of fixed sizes, with more sequences than run at once; the live counts change."""
    op = op_for(name, "cuda", dtype, size)
    capacity, length, heads = 40, 1200, 16
    tokens, state = draw(op, "cuda", 1, length, heads, slots=capacity)
    bounds = torch.zeros(capacity + 1, dtype=torch.int32, device="cuda")
    slots = indices([-1] * capacity, "cuda")
    other = state.clone()
    op(*tokens, state, bounds, slots)
    assert torch.equal(state, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*tokens, state, bounds, slots)
    for lengths in ([500, 3, 64], [], [29] * 40, [1, 1199], list(range(35))):
        fresh, _ = draw(op, "cuda", 1, length, heads, slots=1)
        for x, value in zip(tokens, fresh, strict=True):
            x.copy_(value)
        live, ends = len(lengths), bounds_of(lengths, "cuda")
        order = torch.randperm(capacity)[:live].tolist()
        bounds[: live + 1], bounds[live + 1 :] = ends, ends[-1]
        slots[:live], slots[live:] = indices(order, "cuda"), -1
        graph.replay()
        assert not y[:, sum(lengths) :].any()
        for s, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
            alone = other[order[s]][None]
            part = op(*some(tokens, slice(begin, end)), alone)
            assert torch.equal(part, y[:, begin:end])
            other[order[s]] = alone[0]
        assert torch.equal(other, state)
