"""FLA's calling convention: results, states and gradients against the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from comparing import assert_matches_reference, random_call, relative_rms
from rwkv_jit.compat import fla, fla_calls
from rwkv_jit.compat.fla_backend import register
from rwkv_jit.errors import ArgumentError, ConfigError
from upstream_calls import Function, Tensor, Tokens, dressed

B, T, H, N = 2, 5, 3, 32
Result = tuple[Tensor, Tensor | None]

RWKV6 = {"chunk": fla.chunk_rwkv6, "fused_recurrent": fla.fused_recurrent_rwkv6}
# A default scale of N^-0.5, which is exact for N = 64.
DEFAULT_SCALE = 64**-0.5


def as_chunk_rwkv7(t: Tokens, state: Tensor | None, bounds: Tensor | None) -> Result:
    return fla.chunk_rwkv7(*t.values(), 1.0, state, True, bounds)


def as_fused_recurrent_rwkv7(t: Tokens, state: Tensor | None, bounds: Tensor | None) -> Result:
    r, *rest = t.values()
    return fla.fused_recurrent_rwkv7(
        r / DEFAULT_SCALE, *rest, initial_state=state, cu_seqlens=bounds
    )


def as_chunk_dplr_delta_rule(t: Tokens, state: Tensor | None, bounds: Tensor | None) -> Result:
    return fla.chunk_dplr_delta_rule(
        q=t["r"] / DEFAULT_SCALE, k=t["k"], v=t["v"], a=t["a"], b=t["b"], gk=t["w"],
        initial_state=state, output_final_state=True, cu_seqlens=bounds,
    )  # fmt: skip


def as_rwkv6(function: Callable[..., Result]) -> Function:
    def call(t: Tokens, state: Tensor | None, bounds: Tensor | None) -> Result:
        return function(
            t["r"] / DEFAULT_SCALE, t["k"], t["v"], t["w"], t["u"], initial_state=state,
            output_final_state=True, cu_seqlens=bounds,
        )  # fmt: skip

    return call


CALLS = {
    "chunk_rwkv7": ("wkv7", as_chunk_rwkv7),
    "fused_recurrent_rwkv7": ("wkv7", as_fused_recurrent_rwkv7),
    "chunk_dplr_delta_rule": ("wkv7", as_chunk_dplr_delta_rule),
    **{f"{name}_rwkv6": ("wkv6", as_rwkv6(function)) for name, function in RWKV6.items()},
}


def log_decays(*shape: int) -> Tensor:
    return -torch.rand(*shape, dtype=torch.float64) * 3


def arguments7(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype) for x in random_call(B, T, H, N, w=log_decays(B, T, H, N)).tokens.values()]


def arguments6(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """r, k, v, w and u, in upstream's order."""
    tokens = random_call(B, T, H, N, op="wkv6", w=log_decays(B, T, H, N)).tokens
    return [tokens[name].to(dtype) for name in "rkvwu"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_results_states_and_gradients_match_the_reference(name: str, dtype: str) -> None:
    op, function = CALLS[name]
    ours = dressed(op, function, dtype, 64, decay="log", state_layout="kv")
    call = random_call(2, 19, 2, 64, op=op, w=log_decays(2, 19, 2, 64))
    assert_matches_reference(ours, call, "cpu")


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", CALLS)
def test_packed_sequences_match_the_reference(name: str, kind: torch.dtype) -> None:
    op, function = CALLS[name]
    ours = dressed(op, function, "fp32", 64, decay="log", state_layout="kv")
    call = random_call(1, 24, 2, 64, op=op, w=log_decays(1, 24, 2, 64), sequences=4)
    call.cu_seqlens = torch.tensor([0, 7, 7, 8, 24], dtype=kind)
    assert_matches_reference(ours, call, "cpu")


@pytest.mark.parametrize("name", ["chunk_rwkv7", "chunk_rwkv6"])
def test_decays_of_float32_go_with_tokens_of_bfloat16(name: str) -> None:
    op, function = CALLS[name]
    ours = dressed(op, function, "bf16", 64, decay="log", state_layout="kv")
    call = random_call(2, 19, 2, 64, op=op, w=log_decays(2, 19, 2, 64))
    call.w_dtype = torch.float32
    assert_matches_reference(ours, call, "cpu")


def loop(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Result:
    """The recurrences with states [B, H, K, V] of any widths; `rest` is u, or a and b."""
    outputs = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        before = state
        state = state * w[:, t].exp()[..., None] + kv
        if len(rest) == 1:
            seen = before + rest[0][:, :, None] * kv
        else:
            a, b = rest[0][:, t], rest[1][:, t]
            seen = state = state + b[..., None] * (a[:, :, None] @ before)
        outputs.append((r[:, t, :, None] @ seen)[:, :, 0])
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize(("keys", "values"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
def test_keys_and_values_of_different_widths_match_a_loop(
    name: str, keys: int, values: int
) -> None:
    call = random_call(B, T, H, 32, op=name, w=log_decays(B, T, H, 32))
    exact = {key: x[..., : values if key == "v" else keys] for key, x in call.tokens.items()}
    exact = {"state": torch.randn(B, H, keys, values).double(), **exact}
    results, grads = [], []
    for dtype in (torch.float32, torch.float64):
        leaves = {key: x.detach().to(dtype).requires_grad_() for key, x in exact.items()}
        if dtype == torch.float64:
            pair = loop(*leaves.values())
        elif name == "wkv6":
            tokens = [leaves[key] for key in "rkvwu"]
            pair = fla.chunk_rwkv6(*tokens, 1.0, leaves["state"], True)
        else:
            state, *tokens = leaves.values()
            pair = fla.chunk_rwkv7(*tokens, 1.0, state, True)
        assert pair[1] is not None
        torch.manual_seed(0)
        given = [torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in pair]
        results.append(pair)
        grads.append(torch.autograd.grad(pair, list(leaves.values()), given))
    for mine, right in zip(
        (*results[0], *grads[0]), (*results[1], *grads[1]), strict=True
    ):  # fmt: skip
        assert relative_rms(mine, right) <= 1e-5


def test_the_default_scale_is_of_the_width_of_keys() -> None:
    r, k, v, w, u = arguments6()
    narrow = [r[..., :16], k[..., :16], v, w[..., :16], u[:, :16]]
    assert torch.equal(fla.chunk_rwkv6(*narrow)[0], fla.chunk_rwkv6(*narrow, scale=0.25)[0])


def test_a_state_of_other_widths_is_refused() -> None:
    r, w, k, v, a, b = arguments7()
    narrow = [x[..., :16] for x in (r, w, k)], [x[..., :16] for x in (a, b)]
    with pytest.raises(ArgumentError, match=r"must be \[B, H, K, V\] with K=16 and V=32"):
        fla.chunk_rwkv7(*narrow[0], v, *narrow[1], 1.0, torch.zeros(B, H, 32, 32))


@pytest.mark.parametrize(
    ("function", "arguments", "default"),
    [
        (fla.chunk_rwkv6, arguments6, N**-0.5),
        (fla.fused_recurrent_rwkv6, arguments6, N**-0.5),
        (fla.chunk_rwkv7, arguments7, 1.0),
        (fla.fused_recurrent_rwkv7, arguments7, N**-0.5),
        (fla.fused_mul_recurrent_rwkv7, arguments7, 1.0),
    ],
)
def test_default_scales(
    function: Callable[..., Result], arguments: Callable[[], list[Tensor]], default: float
) -> None:
    given = arguments()
    assert torch.equal(function(*given)[0], function(*given, scale=default)[0])
    assert torch.equal(function(*given, scale=None)[0], function(*given, scale=N**-0.5)[0])
    assert not torch.equal(function(*given)[0], function(*given, scale=0.5)[0])


def test_default_final_states() -> None:
    assert fla.chunk_rwkv6(*arguments6())[1] is None
    assert fla.fused_recurrent_rwkv6(*arguments6())[1] is None
    assert fla.chunk_rwkv7(*arguments7())[1] is None
    assert fla.fused_mul_recurrent_rwkv7(*arguments7())[1] is None
    state = fla.fused_recurrent_rwkv7(*arguments7())[1]
    assert state is not None
    assert state.dtype == torch.float32


def test_fused_mul_takes_the_normalised_key_and_the_gate() -> None:
    r, w, k, v, a, b = arguments7()
    kk = (-a).requires_grad_()
    gate = (b / -a).detach().requires_grad_()
    state = torch.randn(B, H, N, N)
    results = [
        fla.fused_mul_recurrent_rwkv7(r, w, k, v, kk, gate, 1.0, state, True),
        fla.chunk_rwkv7(r, w, k, v, -kk, kk * gate, 1.0, state, True),
    ]
    assert all(map(torch.equal, *results))
    assert all(
        map(torch.equal, *(torch.autograd.grad(y.square().sum(), (kk, gate)) for y, _ in results))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_initial_states_have_any_dtype(dtype: torch.dtype) -> None:
    given, state = arguments7(), torch.randn(B, H, N, N).to(dtype)
    result = fla.chunk_rwkv7(*given, 1.0, state, True)
    assert all(map(torch.equal, result, fla.chunk_rwkv7(*given, 1.0, state.float(), True)))


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 64},
        {"disable_recompute": True},
        {"cu_seqlens_cpu": torch.tensor([0, T])},
        {"safe_gate": True},
        {"lower_bound": -3.5},
        {"safe_gate": True, "lower_bound": -0.61, "chunk_size": 64},
    ],
)
def test_arguments_of_how_to_compute_change_nothing(options: dict[str, object]) -> None:
    given = arguments7()
    result = fla.chunk_rwkv7(*given, **options)  # type: ignore[arg-type]
    assert torch.equal(result[0], fla.chunk_rwkv7(*given)[0])


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, None),
        ({"safe_gate": True}, -5.0),
        ({"lower_bound": -20.0}, -20.0),
        ({"safe_gate": True, "lower_bound": -20.0}, -20.0),
    ],
)
def test_declared_bounds_reach_the_operator(
    options: dict[str, object], bound: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []
    original = fla_calls.operator_for

    def watch(*args: object, lower_bound: float | None, **others: object) -> object:
        asked.append(lower_bound)
        return original(*args, lower_bound=lower_bound, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(fla_calls, "operator_for", watch)
    fla.chunk_rwkv7(*arguments7(), **options)  # type: ignore[arg-type]
    assert asked == [bound]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (fla.fused_recurrent_rwkv6, {"reverse": True}, "reverse=True is not supported; flip"),
        (fla.fused_mul_recurrent_rwkv7, {"reverse": True}, "reverse=True is not supported; flip"),
        (fla.chunk_rwkv7, {"cp_context": object()}, "cp_context is not supported; pass None"),
        (fla.chunk_dplr_delta_rule, {"cp_context": object()}, "cp_context is not supported"),
    ],
)
def test_arguments_of_what_to_compute_are_refused(
    function: Callable[..., Result], options: dict[str, object], message: str
) -> None:
    given = arguments6() if "rwkv6" in function.__name__ else arguments7()
    with pytest.raises(ArgumentError, match=f"{function.__name__}: {message}"):
        function(*given, **options)


@pytest.mark.parametrize("function", [fla.chunk_rwkv6, fla.chunk_dplr_delta_rule])
def test_head_first_is_no_argument(function: Callable[..., Result]) -> None:
    with pytest.raises(TypeError, match="head_first"):
        function(*arguments6(), torch.zeros(1), head_first=True)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda r: r[0], r"chunk_rwkv7: r has shape \[5, 3, 32\], but must be \[B, T, H, N\]"),
        (
            2,
            lambda k: k[..., :16],
            r"r has shape \[2, 5, 3, 32\], but k has K=16 in \[B, T, H, K\]",
        ),
        (3, lambda v: v[:, :2], r"v has T=2 in \[B, T, H, N\], but r has T=5"),
        (2, lambda k: k.half(), "k is float16, but must be float32"),
        (2, lambda _: 1, "k is a int, not a tensor"),
        (4, lambda a: a.to("meta"), "a is on meta, but r is on cpu"),
    ],
)
def test_refusals_name_argument_value_and_rule(
    position: int, change: Callable[[Tensor], object], message: str
) -> None:
    given: list[object] = [*arguments7()]
    given[position] = change(given[position])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=message):
        fla.chunk_rwkv7(*given)  # type: ignore[arg-type]


def test_packing_needs_a_batch_of_one_and_a_state_for_each_sequence() -> None:
    bounds = torch.tensor([0, T])
    with pytest.raises(ArgumentError, match="cu_seqlens packs sequences into B=1"):
        fla.chunk_rwkv7(*arguments7(), cu_seqlens=bounds)
    first = [x[:1] for x in arguments7()]
    with pytest.raises(ArgumentError, match="initial_state has S=2"):
        fla.chunk_rwkv7(*first, initial_state=torch.zeros(2, H, N, N), cu_seqlens=bounds)


def test_registering_without_fla_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    with pytest.raises(ConfigError, match=r"install flash-linear-attention 0\.6\.0 or later"):
        register()
