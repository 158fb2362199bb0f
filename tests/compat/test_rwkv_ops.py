"""rwkv_ops' calling convention: results, states and gradients against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from comparing import TOLERANCES, assert_matches_reference, random_call, relative_rms
from rwkv_jit.compat import rwkv_ops
from rwkv_jit.errors import ArgumentError, ConfigError
from rwkv_jit.reference import REFERENCES
from upstream_calls import Tensor, Tokens, dressed

for_each_dtype = pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
for_each_layout = pytest.mark.parametrize("head_first", [False, True])
B, T, H, N = 2, 5, 3, 32


def turned(x: Tensor, head_first: bool) -> Tensor:
    return x.transpose(1, 2) if head_first else x


def arguments7(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype) for x in random_call(B, T, H, N).tokens.values()]


def arguments6(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """r, k, v, w [B, T, C] and u [H, N], in upstream's order."""
    tokens = random_call(B, T, H, N, op="wkv6").tokens
    return [*(tokens[name].flatten(2).to(dtype) for name in "rkvw"), tokens["u"].to(dtype)]


def states() -> Tensor:
    return torch.randn(B, H, N, N)


@for_each_dtype
@for_each_layout
def test_rwkv7_matches_the_reference(dtype: str, head_first: bool) -> None:
    def call(t: Tokens, state: Tensor | None, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tokens = [turned(x, head_first) for x in t.values()]
        result = rwkv_ops.rwkv7_op(*tokens, state, head_first=head_first)
        assert isinstance(result, tuple)
        assert result[0].shape == tokens[0].shape, "laid out as the inputs are"
        return turned(result[0], head_first), result[1]

    ours = dressed("wkv7", call, dtype, 64, decay="loglog", state_layout="vk")
    assert_matches_reference(ours, random_call(2, 19, 2, 64), "cpu")


@for_each_dtype
@for_each_layout
def test_rwkv6_matches_the_reference_with_states_of_key_and_value(
    dtype: str, head_first: bool
) -> None:
    def call(t: Tokens, state: Tensor | None, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r, k, v, w = (
            t[name].transpose(1, 2) if head_first else t[name].flatten(2) for name in "rkvw"
        )
        result = rwkv_ops.rwkv6_op(r, k, v, w, t["u"], state, True, head_first=head_first)
        assert isinstance(result, tuple)
        assert result[0].shape == r.shape, "laid out as the inputs are"
        y = result[0].transpose(1, 2) if head_first else result[0].view(t["r"].shape)
        return y, result[1]

    ours = dressed("wkv6", call, dtype, 64, decay="loglog", state_layout="kv")
    assert_matches_reference(ours, random_call(2, 19, 2, 64, op="wkv6"), "cpu")


def masked_reference(tokens: list[Tensor], state: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token in float64: one whose mask is 0 outputs as ever, and its state is dropped."""
    outputs = []
    state = state.double()
    for t in range(mask.shape[1]):
        y, after = REFERENCES["wkv7"](*(x[:, t : t + 1] for x in tokens), state, True)
        assert after is not None
        outputs.append(y)
        state = torch.where(mask[:, t].bool()[:, None, None, None], after, state)
    return torch.cat(outputs, 1), state


@for_each_dtype
@for_each_layout
def test_masked_tokens_output_and_leave_the_state_alone(dtype: str, head_first: bool) -> None:
    call = random_call(3, 19, 2, 64)
    of = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    mask = torch.ones(3, 19)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    mask[2, ::3] = 0
    given = [x.to(of).requires_grad_() for x in call.tokens.values()]
    assert call.initial_state is not None
    state = call.initial_state.float().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*given, state)]
    truth = masked_reference(exact[:-1], exact[-1], mask)
    turned_in = [turned(x, head_first) for x in given]
    result = rwkv_ops.generalized_delta_rule(*turned_in, state, True, head_first, 16, mask)
    y, final = turned(result[0], head_first), result[1]
    assert call.dy is not None
    assert call.dfinal_state is not None
    dy, dfinal = call.dy.to(of), call.dfinal_state.float()
    grads = torch.autograd.grad((y, final), (*given, state), (dy, dfinal))
    right = torch.autograd.grad(truth, exact, (dy.double(), dfinal.double()))
    output, gradient, decay = TOLERANCES[dtype]
    assert relative_rms(y, truth[0]) <= output
    assert relative_rms(final, truth[1]) <= output
    for name, grad, true in zip((*"rwkvab", "state"), grads, right, strict=True):
        assert relative_rms(grad, true) <= (decay if name == "w" else gradient), name


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask[..., None, None],
        lambda mask: mask.bool(),
        lambda mask: mask.long(),
        lambda mask: mask.bfloat16(),
    ],
)
def test_masks_have_any_dtype_and_two_or_four_axes(change: Callable[[Tensor], Tensor]) -> None:
    given, mask = arguments7(), (torch.rand(B, T) < 0.5).float()
    expected = rwkv_ops.rwkv7_op(*given, mask=mask)
    assert all(map(torch.equal, rwkv_ops.rwkv7_op(*given, mask=change(mask)), expected))


def test_a_mask_of_ones_changes_nothing() -> None:
    given = arguments7()
    expected = rwkv_ops.rwkv7_op(*given)
    assert all(map(torch.equal, rwkv_ops.rwkv7_op(*given, mask=torch.ones(B, T)), expected))


def test_the_state_comes_by_default_for_rwkv7_and_not_for_rwkv6() -> None:
    assert isinstance(rwkv_ops.rwkv7_op(*arguments7()), tuple)
    assert isinstance(rwkv_ops.rwkv7_op(*arguments7(), output_final_state=False), Tensor)
    assert isinstance(rwkv_ops.rwkv6_op(*arguments6(), head_size=N), Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_state_serves_all_sequences_and_has_any_dtype(dtype: torch.dtype) -> None:
    state = states()[:1].to(dtype).requires_grad_()
    for function, given in (
        (rwkv_ops.rwkv7_op, arguments7()),
        (rwkv_ops.get_rwkv6_kernel(N), arguments6()),
    ):
        y, final = function(*given, state, True)
        same = state.detach().float().expand(B, -1, -1, -1)
        expected = function(*given, same, True)
        assert torch.equal(y, expected[0])
        assert torch.equal(final, expected[1])
        (grad,) = torch.autograd.grad(y.sum(), state)
        assert grad.shape == (1, H, N, N)
        assert grad.dtype == dtype


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda m: torch.tensor(m, dtype=torch.int32)])
def test_state_map_chooses_the_state_of_each_sequence(kind: Callable[[list[int]], object]) -> None:
    wkv6, given = rwkv_ops.get_rwkv6_kernel(N), arguments6()
    pool = torch.randn(4, H, N, N, requires_grad=True)
    result = wkv6(*given, pool, True, state_map=kind([3, 1]))
    assert all(map(torch.equal, result, wkv6(*given, pool[[3, 1]], True)))
    (grad,) = torch.autograd.grad(result[0].sum(), pool)
    assert [bool(part.any()) for part in grad] == [False, True, False, True]


def test_one_state_of_three_axes_serves_all_sequences() -> None:
    wkv6, given, state = rwkv_ops.get_rwkv6_kernel(N), arguments6(), states()[0]
    expected = wkv6(*given, state.expand(B, -1, -1, -1), True)
    assert all(map(torch.equal, wkv6(*given, state, True), expected))


def test_bonus_is_flat_or_by_heads_or_a_variable() -> None:
    class Variable:
        """As keras has them: a holder of a tensor."""

        def __init__(self, value: Tensor) -> None:
            self.value = value

    wkv6, (*tokens, u) = rwkv_ops.get_rwkv6_kernel(N), arguments6()
    for other in (u.flatten(), Variable(u)):
        assert torch.equal(wkv6(*tokens, other), wkv6(*tokens, u))


def test_inference_is_the_same_without_gradients() -> None:
    given = [x.requires_grad_() for x in arguments7()]
    y, final = rwkv_ops.rwkv7_op_inference(*given, states())
    assert not y.requires_grad
    assert not final.requires_grad
    state = states()
    results = rwkv_ops.rwkv7_op_inference(*given, state), rwkv_ops.rwkv7_op(*given, state)
    assert all(map(torch.equal, *results))


@for_each_layout
def test_single_steps_continue_a_sequence(head_first: bool) -> None:
    given = [turned(x, head_first) for x in arguments7()]
    whole, last = rwkv_ops.rwkv7_op(*given, head_first=head_first)
    axis = 2 if head_first else 1
    outputs, state = [], None
    for t in range(T):
        step = [x.narrow(axis, t, 1) for x in given]
        y, state = rwkv_ops.rwkv7_op_rnn(*step, state, head_first=head_first)
        outputs.append(y)
    assert relative_rms(torch.cat(outputs, axis), whole) < 1e-6
    assert state is not None
    assert relative_rms(state, last) < 1e-6


def test_factories_give_the_functions_for_one_head_size() -> None:
    given = arguments7()
    train, infer = rwkv_ops.get_generalized_delta_rule(HEAD_SIZE=N, KERNEL_TYPE="cuda")
    step = rwkv_ops.get_rnn_generalized_delta_rule(N, "triton", chunk_size=32)
    expected = rwkv_ops.rwkv7_op(*given)
    assert all(map(torch.equal, train(*given, chunk_size=32), expected))
    assert all(map(torch.equal, infer(*given), expected))
    first = [x[:, :1] for x in given]
    assert all(map(torch.equal, step(*first), rwkv_ops.rwkv7_op(*first)))
    for function in rwkv_ops.get_generalized_delta_rule():
        with pytest.raises(ArgumentError, match=r"r has N=32 .* head_size=64"):
            function(*given)


@pytest.mark.parametrize(
    "factory",
    [
        rwkv_ops.get_generalized_delta_rule,
        rwkv_ops.get_rnn_generalized_delta_rule,
        rwkv_ops.get_rwkv6_kernel,
    ],
)
def test_unknown_kernel_types_are_refused(factory: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="KERNEL_TYPE='pallas' is not known; choose from native"):
        factory(KERNEL_TYPE="pallas")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({0: lambda r: r[0]}, {}, r"generalized_delta_rule: r has shape .* \[B, T, H, N\]"),
        ({3: lambda v: v[:, :2]}, {}, r"v has T=2 in \[B, T, H, N\], but r has T=5"),
        ({2: lambda k: k.half()}, {}, "k is float16, but must be float32"),
        ({0: lambda r: r.long()}, {}, "r is torch.int64, but must be bfloat16, float16 or float32"),
        ({5: lambda b: b[0]}, {"head_first": True}, r"b has shape .* must be \[B, H, T, N\]"),
        ({}, {"mask": torch.ones(B, T + 1)}, r"mask has shape \[2, 6\], but must be \[B, T\]"),
        ({}, {"mask": [1]}, "mask is a list, not a tensor"),
        ({}, {"initial_state": torch.zeros(B + 1, H, N, N)}, "initial_state has S=3"),
    ],
)
def test_rwkv7_refusals_name_argument_value_and_rule(
    change: dict[int, Callable[[Tensor], Tensor]], options: dict[str, object], message: str
) -> None:
    given = arguments7()
    for position, function in change.items():
        given[position] = function(given[position])
    with pytest.raises(ArgumentError, match=message):
        rwkv_ops.rwkv7_op(*given, **options)  # type: ignore[arg-type]


def test_single_steps_refuse_more_tokens() -> None:
    with pytest.raises(ArgumentError, match="r has T=5, but must have T=1; use generalized_delta"):
        rwkv_ops.rnn_generalized_delta_rule(*arguments7())
    given = [x.transpose(1, 2) for x in arguments7()]
    with pytest.raises(ArgumentError, match="r has T=5, but must have T=1"):
        rwkv_ops.rnn_generalized_delta_rule(*given, head_first=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_map": [0, 0]}, "state_map is given, but initial_state is None"),
        ({"initial_state": states(), "state_map": [0]}, r"state_map has shape \[1\]"),
        ({"initial_state": states(), "state_map": [0.0, 1.0]}, "dtype torch.float32"),
        (
            {"initial_state": states(), "state_map": [0, 2]},
            r"state_map=\[0, 2\] must lie in 0 to 1",
        ),
        ({"initial_state": torch.zeros(3, H, N, N)}, "initial_state has S=3"),
        ({"head_first": True}, r"r has shape .* with head_first=True must be \[B, H, T, N\]"),
    ],
)
def test_rwkv6_refusals_name_argument_value_and_rule(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        rwkv_ops.rwkv6_op(*arguments6(), head_size=N, **options)  # type: ignore[arg-type]


def test_rwkv6_has_a_head_size_of_64_unless_told() -> None:
    with pytest.raises(ArgumentError, match="multiple of the head size 64"):
        rwkv_ops.rwkv6_op(*arguments6())
