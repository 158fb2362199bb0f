"""Every operator against its float64 reference: results and gradients, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from comparing import (
    SEQUENCE_OPS,
    TOLERANCES,
    Call,
    assert_matches_reference,
    dtype_options,
    of_each_token,
    random_call,
    relative_rms,
    run,
    w_shape,
)
from rwkv_jit import Op, get_op
from rwkv_jit.launch import TORCH_DTYPES
from rwkv_jit.ops import SPECS
from rwkv_jit.reference import REFERENCES

OPS = SEQUENCE_OPS
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
for_each_op = pytest.mark.parametrize("name", OPS)


def op_for(name: str, device: str, dtype: str = "fp32", size: int = 32, **options: object) -> Op:
    return get_op(name, head_size=size, device=device, **dtype_options(dtype), **options)  # type: ignore[arg-type]


def gate(*shape: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64).uniform_(low, high)


def pick(values: list[float], *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape)]


SIZES = [
    ("fp32", 16), ("fp32", 32), ("fp32", 64), ("fp32", 128), ("fp32", 256),
    ("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp16", 32),
]  # fmt: skip
# wkv5 has the templates of wkv6.
FEWER_SIZES = [("fp32", 32), ("fp32", 256), ("bf16", 64)]


@on_each_device
@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        *((name, *row) for name in OPS for row in (FEWER_SIZES if name == "wkv5" else SIZES)),
        ("wkv7", "tf32", 64),
    ],
)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 65, 128])
def test_results_and_gradients_match_the_reference(
    device: str, name: str, dtype: str, size: int, length: int
) -> None:
    assert_matches_reference(
        op_for(name, device, dtype, size), random_call(2, length, 3, size, op=name), device
    )


@pytest.mark.parametrize("size", [8, 24, 40, 72, 200])
@for_each_op
def test_every_multiple_of_eight_is_a_head_size_on_a_cpu(name: str, size: int) -> None:
    assert_matches_reference(
        op_for(name, "cpu", size=size), random_call(1, 18, 2, size, op=name), "cpu"
    )


@for_each_op
@pytest.mark.parametrize("size", [8, 64])
def test_float64_is_exact_on_a_cpu(name: str, size: int) -> None:
    assert_matches_reference(
        op_for(name, "cpu", "fp64", size), random_call(2, 19, 2, size, op=name), "cpu"
    )


@for_each_op
def test_gradcheck_passes_on_the_real_kernel(name: str) -> None:
    op = op_for(name, "cpu", "fp64", 8)
    call = random_call(1, 17, 1, 8, op=name)
    assert call.initial_state is not None
    leaves = [x.clone().requires_grad_() for x in (*call.tokens.values(), call.initial_state)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, True), leaves, atol=1e-6)


def with_w(draw: Callable[[tuple[int, ...]], torch.Tensor]) -> Callable[[str, int], Call]:
    """A call of 48 tokens and two heads whose w is drawn, for an operator and a head size."""

    def make(name: str, size: int) -> Call:
        shape = (1, 48, 2, size)
        return random_call(*shape, op=name, w=draw(w_shape(name, *shape)))

    return make


def serves(name: str, decay: str) -> bool:
    return decay in SPECS[name].decays


# Identical tokens give one y a head, whose relative error in one head is a matter of luck.
ADVERSARIAL: dict[str, tuple[str, Callable[[str, int], Call]]] = {
    "decay near one": ("loglog", with_w(lambda s: gate(*s, low=-16, high=-8))),
    "decay near zero": ("loglog", with_w(lambda s: gate(*s, low=0.5, high=6))),
    "masked, slow and underflowing decay in one chunk": (
        "loglog",
        with_w(lambda s: pick([-1e9, -9.0, -1.0, 1.0, 6.0, 100.0], *s)),
    ),
    "log decay of -50 beside -1e-6": (
        "log",
        with_w(lambda s: pick([-50.0, -10.0, -1.0, -1e-6, 0.0], *s)),
    ),
    "log decay of -50 throughout": ("log", with_w(lambda s: torch.full(s, -50.0))),
    "log decay of -100 beside -0.1": ("log", with_w(lambda s: pick([-100.0, -0.1], *s))),
    "log decay of minus infinity": ("log", with_w(lambda s: pick([-torch.inf, -0.1], *s))),
    "log decay around the bound of the triangles": (
        "log",
        with_w(lambda s: gate(*s, low=-10, high=-6)),
    ),
    "saturated logits": ("logit", with_w(lambda s: gate(*s, low=-90, high=90))),
    "decay factors of 0 and 1": (
        "factor",
        with_w(lambda s: pick([0.0, 1e-30, 0.5, 1 - 2**-7, 1.0], *s)),
    ),
    "large states": ("loglog", lambda op, n: random_call(1, 48, 2, n, op=op, state_scale=1e3)),
    "identical tokens": (
        "loglog",
        lambda op, n: random_call(1, 4096, 4, n, op=op, identical=True),
    ),
    "a long sequence": ("loglog", lambda op, n: random_call(1, 4097, 1, n, op=op)),
    "one decay near one over a long sequence": (
        "loglog",
        lambda op, n: random_call(
            1, 2049, 1, n, op=op, w=torch.full(w_shape(op, 1, 2049, 1, n), -9.0)
        ),
    ),
}


ADVERSARIAL_CASES = [
    (name, case) for name in OPS for case in ADVERSARIAL if serves(name, ADVERSARIAL[case][0])
]
for_each_adversarial = pytest.mark.parametrize(("name", "case"), ADVERSARIAL_CASES)


@on_each_device
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 32), ("bf16", 32), ("bf16", 64)])
@for_each_adversarial
def test_adversarial_inputs_match_the_reference(
    device: str, dtype: str, size: int, name: str, case: str
) -> None:
    decay, make = ADVERSARIAL[case]
    op = op_for(name, device, dtype, size, decay=decay)
    # On tensor cores roundings of the operands add up where the state hardly decays: y's error is
    # 4.0e-3.
    slow = (name, dtype, size, device) == ("wkv7", "bf16", 64, "cuda") and "near one over" in case
    assert_matches_reference(op, make(name, size), device, within={"y": 4.2e-3} if slow else None)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for name, case in ADVERSARIAL_CASES if name == "wkv7"])
def test_adversarial_inputs_match_the_reference_in_tf32(case: str) -> None:
    decay, make = ADVERSARIAL[case]
    op = op_for("wkv7", "cuda", "tf32", 64, decay=decay)
    assert op.config.precision == "tf32"
    # What crosses decays of e^-50 is a small difference of sums, which keeps float32's own error.
    throughout = {"dw": 6e-3} if "-50 throughout" in case else None
    assert_matches_reference(op, make("wkv7", 64), "cuda", within=throughout)


@pytest.mark.gpu
@for_each_adversarial
def test_adversarial_inputs_match_the_reference_in_the_widest_float32_tiles(
    name: str, case: str
) -> None:
    decay, make = ADVERSARIAL[case]
    for size in (64, 128):
        assert_matches_reference(
            op_for(name, "cuda", size=size, decay=decay), make(name, size), "cuda"
        )


@on_each_device
@for_each_op
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_zero_tensors_give_zeros(device: str, name: str, dtype: str) -> None:
    call = random_call(1, 20, 2, 32, op=name)
    call.tokens = {n: torch.zeros_like(x) for n, x in call.tokens.items()}
    call.initial_state = torch.zeros(1, 2, 32, 32)
    call.dfinal_state = torch.zeros(1, 2, 32, 32)
    op = op_for(name, device, dtype)
    for result, value in run(op, call.rounded(op), device).items():
        assert not value.any(), result


@on_each_device
@pytest.mark.parametrize(
    ("name", "decay"), [(name, decay) for name in OPS for decay in SPECS[name].decays]
)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64])
def test_gradients_of_w_and_u_are_those_of_the_tensors_passed_in(
    device: str, name: str, decay: str, w_dtype: torch.dtype, size: int
) -> None:
    w = -gate(*w_shape(name, 1, 20, 2, size), low=0.01, high=3)
    call = random_call(1, 20, 2, size, op=name, w=w.exp() if decay == "factor" else w)
    call.w_dtype = w_dtype
    op = op_for(name, device, "bf16", size, decay=decay)
    assert_matches_reference(op, call, device)
    results = run(op, call.rounded(op), device)
    for gradient in results.keys() & {"dw", "du"}:
        assert results[gradient].dtype == w_dtype


@on_each_device
@for_each_op
@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "fp16"])
def test_state_layouts_and_dtypes(device: str, name: str, layout: str, state_dtype: str) -> None:
    op = op_for(
        name, device, "bf16", 64, state_layout=layout, state_dtype=TORCH_DTYPES[state_dtype]
    )
    call = random_call(2, 19, 2, 64, op=name)
    assert_matches_reference(op, call, device)
    assert run(op, call.rounded(op), device)["final_state"].dtype == TORCH_DTYPES[state_dtype]


@on_each_device
@for_each_op
@pytest.mark.parametrize("chunk_length", [16, 32, 64])
def test_results_do_not_depend_on_the_chunk_length(
    device: str, name: str, chunk_length: int
) -> None:
    call = random_call(1, 133, 2, 32, op=name)
    assert_matches_reference(op_for(name, device, chunk_length=chunk_length), call, device)


def tokens_of(call: Call, begin: int, end: int) -> dict[str, torch.Tensor]:
    return {n: x[:, begin:end] if of_each_token(x) else x for n, x in call.tokens.items()}


@on_each_device
@for_each_op
@pytest.mark.parametrize("cut", [1, 16, 21])
def test_final_state_continues_the_sequence(device: str, name: str, cut: int) -> None:
    op, call = op_for(name, device), random_call(2, 40, 2, 32, op=name)
    call = call.rounded(op)
    whole = run(op, call, device, gradients=False)
    first = run(op, Call(tokens_of(call, 0, cut), call.initial_state), device, gradients=False)
    second = run(
        op, Call(tokens_of(call, cut, 40), first["final_state"].cpu()), device, gradients=False
    )
    y = torch.cat([first["y"], second["y"]], 1)
    assert relative_rms(y, whole["y"]) < 1e-6
    assert relative_rms(second["final_state"], whole["final_state"]) < 1e-6


LENGTHS = [0, 1, 15, 16, 0, 17, 64, 33, 130, 5, 0]


@on_each_device
@for_each_op
@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 32), ("fp32", 128), ("bf16", 64)])
def test_packed_sequences_equal_a_loop_over_them(
    device: str, name: str, bounds_dtype: torch.dtype, dtype: str, size: int
) -> None:
    op = op_for(name, device, dtype, size)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(bounds_dtype)
    call = random_call(1, sum(LENGTHS), 2, size, sequences=len(LENGTHS), op=name)
    call.cu_seqlens = bounds
    assert_matches_reference(op, call, device)
    call = call.rounded(op)
    packed = run(op, call, device)
    assert call.initial_state is not None
    assert call.dy is not None
    assert call.dfinal_state is not None
    for s, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        one = run(
            op,
            Call(
                tokens_of(call, begin, end),
                call.initial_state[s : s + 1],
                dy=call.dy[:, begin:end],
                dfinal_state=call.dfinal_state[s : s + 1],
            ),
            device,
        )
        for result, value in one.items():
            if not of_each_token(value):
                continue  # a sum over the sequences
            whole = packed[result]
            part = whole[s : s + 1] if "state" in result else whole[:, begin:end]
            assert torch.equal(value, part), result


@on_each_device
@for_each_op
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sequence_does_not_depend_on_its_neighbours(device: str, name: str, dtype: str) -> None:
    op, call = op_for(name, device, dtype, 64), random_call(5, 37, 3, 64, op=name)
    call = call.rounded(op)
    together = run(op, call, device)
    assert call.initial_state is not None
    assert call.dy is not None
    assert call.dfinal_state is not None
    row = slice(3, 4)
    alone = run(
        op,
        Call(
            {n: x[row] if of_each_token(x) else x for n, x in call.tokens.items()},
            call.initial_state[row],
            dy=call.dy[row],
            dfinal_state=call.dfinal_state[row],
        ),
        device,
    )
    for result, value in alone.items():
        if of_each_token(value):
            assert torch.equal(value, together[result][row]), result


@on_each_device
@for_each_op
@pytest.mark.parametrize("size", [64, 128])
def test_results_are_the_same_from_run_to_run(device: str, name: str, size: int) -> None:
    op, call = op_for(name, device, "bf16", size), random_call(3, 100, 4, size, op=name)
    call = call.rounded(op)
    first = run(op, call, device)
    for _ in range(3):
        for result, value in run(op, call, device).items():
            assert torch.equal(value, first[result]), result


@on_each_device
@for_each_op
@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 0, 2, 32), (2, 5, 0, 32)])
def test_empty_dimensions_give_empty_results(
    device: str, name: str, shape: tuple[int, int, int, int]
) -> None:
    op = op_for(name, device)
    call = random_call(*shape, op=name).rounded(op)
    results = run(op, call, device)
    assert results["y"].shape == shape
    assert torch.equal(results["final_state"].cpu(), call.initial_state)
    assert torch.equal(results["dinitial_state"].cpu(), call.dfinal_state)
    for result, value in results.items():
        assert "state" in result or not value.any(), result


@on_each_device
@for_each_op
def test_every_element_is_written(device: str, name: str) -> None:
    """torch.empty holds NaN in deterministic mode, so an element left out would show."""
    op = op_for(name, device, "bf16", 64)
    bounds = torch.tensor([0, 3, 3, 40])
    call = random_call(1, 40, 3, 64, sequences=3, op=name)
    call.cu_seqlens = bounds
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=device).isnan().all()
        results = run(op, call.rounded(op), device)
    finally:
        torch.use_deterministic_algorithms(False)
    for result, value in results.items():
        assert value.isfinite().all(), result


@on_each_device
@for_each_op
def test_any_strides_and_alignment_give_the_same(device: str, name: str) -> None:
    op, call = op_for(name, device, "bf16", 64), random_call(2, 21, 3, 64, op=name)
    call = call.rounded(op)
    plain = run(op, call, device)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous().mT

    def misaligned(x: torch.Tensor) -> torch.Tensor:
        padded = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
        padded[1:] = x.to(device).reshape(-1)
        return padded[1:].view(x.shape)

    for change in (strided, misaligned):
        tokens = {n: change(x).to(device) for n, x in call.tokens.items()}
        assert call.initial_state is not None
        y, final = op(
            **tokens, initial_state=call.initial_state.to(device), output_final_state=True
        )
        assert final is not None
        assert torch.equal(y, plain["y"])
        assert torch.equal(final, plain["final_state"])


@on_each_device
@for_each_op
def test_gradients_flow_from_final_state_alone_and_to_initial_state_alone(
    device: str, name: str
) -> None:
    op, call = op_for(name, device), random_call(1, 20, 2, 32, op=name)
    call = call.rounded(op)
    tokens = [x.to(device) for x in call.tokens.values()]
    assert call.initial_state is not None
    state = call.initial_state.to(device).clone().requires_grad_()
    _, final = op(*tokens, state, True)
    assert final is not None
    final.sum().backward()
    truth = call.initial_state.double().requires_grad_()
    _, expected = REFERENCES[name](*(x.cpu() for x in tokens), truth, True)
    assert expected is not None
    expected.sum().backward()
    assert state.grad is not None
    assert truth.grad is not None
    assert relative_rms(state.grad, truth.grad) < TOLERANCES["fp32"][1]


@pytest.mark.gpu
@for_each_op
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 32), ("bf16", 64)])
@pytest.mark.parametrize("bounds", [[-7, 90, 5, 1 << 40], [0, 64, 0, 64, 0, 64]])
def test_bad_bounds_on_a_gpu_stay_inside_the_tensors(
    name: str, dtype: str, size: int, bounds: list[int]
) -> None:
    op = op_for(name, "cuda", dtype, size)
    call = random_call(1, 64, 2, size, sequences=len(bounds) - 1, op=name)
    call.cu_seqlens = torch.tensor(bounds)
    run(op, call.rounded(op), "cuda")
    torch.cuda.synchronize()
