"""The steps around the recurrence: what every one of them proves, and what each alone has."""

from __future__ import annotations

import math

import pytest
import torch

from comparing import relative_rms
from elementwise import (
    DIGITS,
    OPS,
    SPECS,
    Sizes,
    Tensors,
    draw,
    make_op,
    options_of,
    outputs_of,
    roundings,
    run,
    truth,
)
from rwkv_jit import get_op
from rwkv_jit.arguments import sum_groups
from rwkv_jit.errors import ArgumentError, ConfigError

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
for_each_op = pytest.mark.parametrize("name", OPS)
WITH_HEADS = tuple(name for name in OPS if SPECS[name].knobs)
# Relative RMS error of results, and of gradients that are sums over tokens.
LIMITS = {
    torch.float64: (1e-14, 1e-14),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (4e-3, 1e-2),
    torch.float16: (5e-4, 1e-2),
}
DTYPES = [
    pytest.param("cpu", torch.float64, None),
    pytest.param("cpu", torch.float32, None),
    pytest.param("cpu", torch.bfloat16, None),
    pytest.param("cpu", torch.bfloat16, torch.float32),
    pytest.param("cuda", torch.float32, None, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, None, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, torch.float32, marks=pytest.mark.gpu),
]


def assert_right(
    name: str,
    tensors: Tensors,
    dtype: torch.dtype,
    device: str,
    sizes: Sizes | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Outputs and gradients agree with the reference: those of tokens within one rounding."""
    right, given = truth(name, tensors, dtype, bounds)
    made = run(make_op(name, dtype, device, sizes), tensors, given, bounds)
    of_channels = {tensor.name for tensor in SPECS[name].called.inputs if "fp32" in tensor.dtype}
    outputs = zip(made.outputs, right.outputs, strict=True)
    pairs = {f"output {at}": pair for at, pair in enumerate(outputs)}
    pairs |= {f"d{n}": (x, right.gradients[n]) for n, x in made.gradients.items()}
    for label, (value, expected) in pairs.items():
        summed = label.removeprefix("d") in of_channels
        assert relative_rms(value, expected) <= LIMITS[dtype][summed], label
        if dtype in DIGITS and not summed:
            assert roundings(value, expected) <= 1.01, label


@for_each_op
@pytest.mark.parametrize(("device", "dtype", "parameters"), DTYPES)
def test_results_are_within_one_rounding_of_float64_and_sums_are_right(
    name: str, device: str, dtype: torch.dtype, parameters: torch.dtype | None
) -> None:
    assert_right(name, draw(name, dtype, device, parameters=parameters), dtype, device)


@for_each_op
@on_each_device
@pytest.mark.parametrize(
    ("batch", "length", "heads"),
    [(1, 1, 3), (3, 1, 2), (1, 700, 1), (2, 40, 13), (1, 3, 300)],
    ids=str,
)
def test_any_number_of_tokens_and_channels_is_right(
    name: str, device: str, batch: int, length: int, heads: int
) -> None:
    sizes = Sizes(batch, length, heads)
    tensors = draw(name, torch.float32, device, sizes)
    assert_right(name, tensors, torch.float32, device, sizes)


@on_each_device
@pytest.mark.parametrize("name", [name for name in OPS if name not in WITH_HEADS])
@pytest.mark.parametrize("channels", [1, 7, 63, 65, 100, 128])
def test_any_number_of_channels_is_right_where_there_are_no_heads(
    name: str, device: str, channels: int
) -> None:
    sizes = Sizes(2, 11, 1, channels)
    tensors = draw(name, torch.bfloat16, device, sizes)
    assert_right(name, tensors, torch.bfloat16, device, sizes)


@on_each_device
@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize(
    ("size", "dtype"), [(2, torch.float32), (7, torch.float32), (64, torch.bfloat16)], ids=str
)
def test_any_head_size_is_right(name: str, device: str, size: int, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 19, 5, size)
    tensors = draw(name, dtype, device, sizes)
    assert_right(name, tensors, dtype, device, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize("size", [33, 48, 96, 128, 253, 256])
def test_any_head_size_is_right_on_a_gpu(name: str, size: int) -> None:
    sizes = Sizes(2, 19, 5, size)
    tensors = draw(name, torch.bfloat16, "cuda", sizes)
    assert_right(name, tensors, torch.bfloat16, "cuda", sizes)


@on_each_device
@for_each_op
def test_several_tokens_of_a_group_are_right(name: str, device: str) -> None:
    sizes = Sizes(2, 1100, 32, 64)
    assert sum_groups(2200, 2048) == 1024
    tensors = draw(name, torch.bfloat16, device, sizes)
    assert_right(name, tensors, torch.bfloat16, device, sizes)


@on_each_device
@pytest.mark.parametrize("bounds", [[0, 5, 5, 37], [0, 0, 1, 2, 36, 37, 37], [0, 37]], ids=str)
def test_packed_sequences_are_right_empty_ones_included(device: str, bounds: list[int]) -> None:
    sizes = Sizes(1, 37, sequences=len(bounds) - 1)
    tensors = draw("token_shift_mix", torch.float32, device, sizes)
    packed = torch.tensor(bounds, device=device, dtype=torch.int32)
    assert_right("token_shift_mix", tensors, torch.float32, device, sizes, packed)


@on_each_device
def test_many_packed_sequences_are_right(device: str) -> None:
    lengths = torch.randint(0, 9, (300,))
    packed = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device)
    sizes = Sizes(1, int(lengths.sum()), 1, 16, sequences=300)
    tensors = draw("token_shift_mix", torch.float32, device, sizes)
    assert_right("token_shift_mix", tensors, torch.float32, device, sizes, packed)


@on_each_device
def test_a_final_state_continues_the_sequence(device: str) -> None:
    tensors = draw("token_shift_mix", torch.float32, device)
    op = make_op("token_shift_mix", torch.float32, device)
    *whole, last = op(**tensors, output_final_state=True)
    x, state = tensors.pop("x"), tensors.pop("initial_state")
    *first, state = op(x[:, :14], **tensors, initial_state=state, output_final_state=True)
    *second, state = op(x[:, 14:], **tensors, initial_state=state, output_final_state=True)
    assert torch.equal(state, last)
    for one, other, both in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat([one, other], 1), both)


@on_each_device
@pytest.mark.parametrize("name", ["token_shift_mix", "addcmul_mix"])
def test_any_subset_of_uses_gives_what_all_of_them_give(name: str, device: str) -> None:
    tensors = draw(name, torch.float32, device)
    right, given = truth(name, tensors, torch.float32)
    op = make_op(name, torch.float32, device)
    of_tokens = {n: x.requires_grad_() for n, x in tensors.items() if not n.startswith("x_")}
    uses = "rwkvag"
    for wanted in ("k", "rg", "wkva"):
        mixes = {f"x_{use}": tensors[f"x_{use}"].requires_grad_() for use in wanted}
        results = op(**of_tokens, **mixes)
        assert all(y is None for y in results[6:])
        assert [use for use, y in zip(uses, results, strict=False) if y is not None] == [*wanted]
        places = [uses.index(use) for use in wanted]
        grads = torch.autograd.grad(
            [results[at] for at in places],
            list(mixes.values()),
            [given[at].to(device, torch.float32) for at in places],
        )
        for use, at, grad in zip(wanted, places, grads, strict=True):
            assert relative_rms(results[at], right.outputs[at]) < 1e-6
            assert relative_rms(grad, right.gradients[f"x_{use}"]) < 2e-6


@on_each_device
def test_a_shift_given_as_a_difference_mixes_the_same(device: str) -> None:
    tensors = draw("token_shift_mix", torch.float32, device)
    mixed = make_op("token_shift_mix", torch.float32, device)(**tensors)
    x, before = tensors["x"], tensors.pop("initial_state")[:, None]
    delta = torch.cat([before, x[:, :-1]], 1) - x
    given = make_op("addcmul_mix", torch.float32, device)(**tensors, delta=delta)
    assert all(map(torch.equal, given, mixed[:6]))


@on_each_device
def test_the_key_that_is_added_is_the_same_alone(device: str) -> None:
    tensors = draw("kk_pre", torch.float32, device)
    new_k, _, _ = make_op("kk_pre", torch.float32, device)(**tensors)
    k, a, k_a = tensors["k"].flatten(2), tensors["a"].flatten(2), tensors["k_a"]
    update = make_op("k_update", torch.float32, device)
    assert torch.equal(update(k, a, k_a), new_k.flatten(2))
    assert torch.equal(update(k, torch.ones_like(a), k_a), k)


@on_each_device
def test_a_readout_is_a_group_norm_and_a_gate_output_correction(device: str) -> None:
    tensors = draw("readout", torch.float32, device)
    right, _ = truth("readout", tensors, torch.float32)
    weight, bias = tensors.pop("weight"), tensors.pop("bias")
    y = tensors.pop("y")
    rows = y.reshape(-1, weight.shape[0])
    normed = torch.nn.functional.group_norm(rows, y.shape[2], weight, bias, 64e-5).view_as(y)
    out = make_op("gate_output_correction", torch.float32, device)(normed, **tensors)
    assert relative_rms(out, right.outputs[0]) < 1e-6


@on_each_device
def test_tokens_are_shifted_within_their_batch_row(device: str) -> None:
    op = make_op("token_shift_mix", torch.float32, device)
    x = torch.randn(2, 5, 60, device=device)
    one = torch.ones(60, device=device)
    (_, _, k, *_) = op(x, x_k=one)
    expected = torch.nn.functional.pad(x, (0, 0, 1, -1))
    assert torch.allclose(k, expected, atol=1e-6)


@for_each_op
@on_each_device
def test_no_tokens_give_empty_results_and_gradients_of_zero(name: str, device: str) -> None:
    for batch, length in ((2, 0), (0, 3)):
        sizes = Sizes(batch, length)
        tensors = draw(name, torch.float32, device, sizes)
        right, given = truth(name, tensors, torch.float32)
        made = run(make_op(name, torch.float32, device), tensors, given)
        for y, expected in zip(made.outputs, right.outputs, strict=True):
            assert torch.equal(y.cpu().double(), expected)
        for label, grad in made.gradients.items():
            assert torch.equal(grad.cpu().double(), right.gradients[label]), label


@for_each_op
@on_each_device
def test_strides_and_alignment_do_not_matter(name: str, device: str) -> None:
    tensors = draw(name, torch.float32, device)
    odd = {}
    for label, x in tensors.items():
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), device=device)
        odd[label] = wide[..., 1:-2].copy_(x)
        assert not odd[label].is_contiguous() or x.dim() == 1
    _, given = truth(name, tensors, torch.float32)
    op = make_op(name, torch.float32, device)
    one, other = run(op, tensors, given), run(op, odd, given)
    assert all(map(torch.equal, one.outputs, other.outputs))
    for label, grad in one.gradients.items():
        assert torch.equal(grad, other.gradients[label]), label


@for_each_op
@on_each_device
def test_results_are_the_same_bits_each_time_and_in_any_batch(name: str, device: str) -> None:
    sizes = Sizes(3, 501)
    tensors = draw(name, torch.float32, device, sizes)
    _, given = truth(name, tensors, torch.float32)
    op = make_op(name, torch.float32, device)
    one, other = run(op, tensors, given), run(op, tensors, given)
    assert all(map(torch.equal, one.outputs, other.outputs))
    for label, grad in one.gradients.items():
        assert torch.equal(grad, other.gradients[label]), label
    by_row = {n: x for n, x in tensors.items() if x.dim() > 2 or n == "initial_state"}
    row = {n: x[1:2] if n in by_row else x for n, x in tensors.items()}
    alone = run(op, row, [dy[1:2] for dy in given])
    for y, of_all in zip(alone.outputs, one.outputs, strict=True):
        assert torch.equal(y, of_all[1:2])
    for label in by_row:
        assert torch.equal(alone.gradients[label], one.gradients[label][1:2]), label


@for_each_op
@on_each_device
@pytest.mark.parametrize("scale", [1e-20, 1e4])
def test_tiny_and_huge_values_are_right(name: str, device: str, scale: float) -> None:
    tensors = draw(name, torch.float32, device, scale=scale)
    if name == "token_shift_mix":
        tensors["initial_state"].mul_(0.5)
    right, given = truth(name, tensors, torch.float32)
    made = run(make_op(name, torch.float32, device), tensors, given)
    for y, expected in zip(made.outputs, right.outputs, strict=True):
        assert relative_rms(y, expected) < 2e-5
    for label, grad in made.gradients.items():
        assert bool(torch.isfinite(grad).all()), label
        largest = float(right.gradients[label].abs().max())
        error = float((grad.cpu().double() - right.gradients[label]).abs().max())
        assert error <= 1e-3 * largest + 1e-30, label


@on_each_device
def test_gates_are_right_where_they_are_wide_open_or_shut(device: str) -> None:
    x = torch.tensor([-1e30, -200.0, -90.0, -80.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e30])
    x = x.expand(1, 3, 10).to(device).contiguous().requires_grad_()
    a0 = torch.zeros(10, device=device)
    y = make_op("a_gate", torch.float32, device)(x, a0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().cpu().double().sigmoid()
    slope = exact * (-x.detach().cpu().double()).sigmoid()
    # A float32 below 1e-37 may be 0.
    assert torch.allclose(y.detach().cpu().double(), exact, rtol=1e-5, atol=1e-37)
    assert torch.allclose(dx.cpu().double(), slope, rtol=1e-5, atol=1e-37)


@on_each_device
def test_a_key_of_zeros_is_normalised_to_zeros_and_has_gradients(device: str) -> None:
    tensors = draw("kk_pre", torch.float32, device)
    tensors["k"][:, 3] = 0
    tensors["k"][:, 4] = 1e-15
    assert_right("kk_pre", tensors, torch.float32, device)


@on_each_device
def test_a_head_that_is_constant_is_normalised_to_the_bias(device: str) -> None:
    tensors = draw("readout", torch.float32, device)
    tensors["y"][:, 3] = 7
    assert_right("readout", tensors, torch.float32, device)


@on_each_device
def test_eps_is_an_argument(device: str) -> None:
    tensors = draw("readout", torch.float32, device)
    op = make_op("readout", torch.float32, device)
    heads, size = tensors["r_k"].shape
    rows = tensors["y"].reshape(-1, heads * size)
    for eps in (1e-5, 0.5):
        norm = torch.nn.functional.group_norm(
            rows, heads, tensors["weight"], tensors["bias"], eps
        ).view_as(tensors["y"])
        bonus = (tensors["r"] * tensors["k"] * tensors["r_k"]).sum(-1, keepdim=True)
        expected = (norm + bonus * tensors["v"]) * tensors["g"]
        assert relative_rms(op(**tensors, eps=eps), expected) < 1e-6
    assert torch.equal(op(**tensors), op(**tensors, eps=64e-5))


def test_what_is_not_a_number_stays_one_and_infinities_are_kept() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -2.0, 3.0]).view(1, 1, 5)
    y = make_op("relu_squared", torch.float32, "cpu")(x)
    assert torch.equal(y.nan_to_num(-1, 7), torch.tensor([[[-1.0, 7, 0, 0, 9]]]))


@for_each_op
def test_gradients_agree_with_finite_differences(name: str) -> None:
    op = make_op(name, torch.float64, "cpu")
    # Where relu's slope jumps there is no derivative.
    tensors = {n: x + 0.3 * x.sign() for n, x in draw(name, torch.float64, "cpu").items()}
    tensors = {n: x[:, :4] if x.dim() > 2 else x for n, x in tensors.items()}
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}

    def call(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(leaves, values, strict=True))
        return tuple(outputs_of(op(**named, **options_of(name, None))))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


REFUSED = [
    ("a_gate", {"a0": torch.randn(59)}, r"a_gate: a0 has C=59 in \[C\], but x has C=60"),
    ("a_gate", {"a0": None}, "a_gate: a0 is None, but only optional tensors may be"),
    ("a_gate", {"x": torch.randn(2, 60)}, r"a_gate: x has shape \[2, 60\], but must be \[B, T, C"),
    ("a_gate", {"x": torch.randn(2, 3, 60).double()}, "a_gate: x is float64, but must be float32"),
    ("kk_pre", {"k_k": torch.randn(3, 20)}, r"kk_pre: k_k has shape \[3, 20\], but must be \[C\]"),
    ("kk_pre", {"k_a": torch.randn(40)}, r"kk_pre: k_a has C=40 in \[C\], but k has C=60"),
    ("kk_pre", {"k": torch.randn(2, 37, 3, 8)}, "kk_pre: k has N=8 .* the operator has head_size="),
    (
        "addcmul_mix",
        {"delta": torch.randn(2, 36, 60)},
        r"addcmul_mix: delta has T=36 in \[B, T, C\], but x has T=37",
    ),
    ("k_update", {"k_a": torch.randn(1, 60)}, r"k_a has shape \[1, 60\], but must be \[C\]"),
    (
        "gate_output_correction",
        {"r_k": torch.randn(60)},
        r"gate_output_correction: r_k has shape \[60\], but must be \[H, N\]",
    ),
    ("readout", {"eps": -1.0}, "readout: eps is -1.0, but must be a number of at least 0"),
    ("readout", {"eps": "1"}, "readout: eps is '1', but must be a number"),
    (
        "token_shift_mix",
        {"initial_state": torch.randn(3, 60)},
        r"token_shift_mix: initial_state has S=3 in \[S, C\], but x has S=2",
    ),
    (
        "token_shift_mix",
        {"cu_seqlens": torch.tensor([0, 3])},
        r"reshape the tensors to \[1, B \* T, C\]",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_tensors_that_do_not_fit_are_refused(
    name: str, change: dict[str, object], message: str
) -> None:
    op = make_op(name, torch.float32, "cpu")
    tensors = draw(name, torch.float32, "cpu")
    # One that was found right before is no excuse.
    op(**tensors)
    with pytest.raises(ArgumentError, match=message):
        op(**{**tensors, **change})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a_gate", {"head_size": 64}, "a_gate: has no head_size, but it is 64; leave it out"),
        ("a_gate", {"decay": "log"}, "a_gate: has no decay, but it is 'log'; leave it out"),
        ("a_gate", {"chunk_length": 16}, "a_gate: has no chunk_length, but it is 16"),
        ("k_update", {"head_size": 64}, "k_update: has no head_size, but it is 64; leave it out"),
        ("kk_pre", {}, "kk_pre: head_size=None must be a whole number from 1 to 256"),
        ("kk_pre", {"head_size": 257}, "kk_pre: head_size=257 must be a whole number from 1 to"),
        ("readout", {"head_size": 64, "state_layout": "kv"}, "readout: has no state_layout"),
        ("wkv7", {}, "wkv7: head_size=None must be a whole number from 1 to 256"),
        ("a_gate", {"arch": "8.0", "dtype": torch.float64}, "dtype=fp64 is not supported on sm_80"),
    ],
)
def test_choices_that_mean_nothing_are_refused(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        get_op(name, **{"dtype": torch.float32, "arch": "cpu", **options})  # type: ignore[call-overload]


def test_slugs_name_what_an_operator_has() -> None:
    kk_pre = get_op("kk_pre", head_size=64, dtype=torch.bfloat16, arch="9.0a")
    assert kk_pre.config.slug == "kk_pre_n64_bf16_sm90a"
    mix = get_op("token_shift_mix", dtype=torch.float32, arch="x86_64_v3")
    assert mix.config.slug == "token_shift_mix_fp32_x86_64_v3"
    for op in (kk_pre, mix):
        assert type(op.config).parse(op.config.slug) == op.config
