"""rwkv_ops 0.11.3's RWKV-7 and RWKV-6 functions for its torch backend, without keras.

What differs from upstream: any T, any head size without a factory, float32 and float16 computed as
such (upstream's kernels round everything to bfloat16), states in float32 with gradients for RWKV-6
too, and head_first=True returns [B, H, T, N], as upstream's documentation says, where its code
returns [B, T, H, N]. KERNEL_TYPE, chunk_size and MAX_SEQUENCE_LENGTH are accepted for the callers'
sake: kernels are ours, and no result depends on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ..errors import ArgumentError, ConfigError
from .rwkv_ops_calls import Result, chosen_states, delta_rule, time_first
from .tensors import as_state, check_is_tensor, operator_for, split_channels, split_heads

KERNEL_TYPES = ("native", "cuda", "triton")


def generalized_delta_rule(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    head_first: bool = False,
    chunk_size: int = 16,
    mask: torch.Tensor | None = None,
    *,
    head_size: int | None = None,
) -> Result:
    """RWKV-7 time mixing; `rwkv7_op` is the same.

    r, k, v, a, b: [B, T, H, N], or [B, H, T, N] if head_first, one floating dtype.
    w: as r, same dtype or float32. The factor is d = exp(-exp(w)).
    initial_state: [B or 1, H, N, N], axes (value, key), any floating dtype. Zeros if None.
    output_final_state: whether to return the state after the last token.
    chunk_size: without effect; any T will do.
    mask: [B, T] or [B, T, 1, 1], any dtype: a token with a mask of 0 or less leaves the state as it
        is. Its output is that of a token that had changed it, as upstream's is. A fraction counts
        as 1, where upstream mixes the states.
    head_size: N, to refuse any other; what a factory sets.

    Returns out, laid out as r and in its dtype, and if output_final_state the state [B, H, N, N]
    in float32; a tuple of both, or out alone. All inputs but the mask get gradients. Raises
    ArgumentError for tensors that do not fit.
    """
    del chunk_size
    return delta_rule(
        "generalized_delta_rule", (r, w, k, v, a, b), initial_state, output_final_state,
        head_first, mask, head_size,
    )  # fmt: skip


@torch.no_grad()
def generalized_delta_rule_inference(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    head_first: bool = False,
    chunk_size: int = 16,
    mask: torch.Tensor | None = None,
    *,
    head_size: int | None = None,
) -> Result:
    """`generalized_delta_rule` without gradients, on a CPU too; `rwkv7_op_inference` is the same.

    The arguments are in the order that upstream documents; its kernel for CUDA has head_first
    before output_final_state.
    """
    del chunk_size
    return delta_rule(
        "generalized_delta_rule_inference", (r, w, k, v, a, b), initial_state, output_final_state,
        head_first, mask, head_size,
    )  # fmt: skip


def rnn_generalized_delta_rule(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    head_first: bool = False,
    chunk_size: int = 16,
    *,
    head_size: int | None = None,
) -> Result:
    """`generalized_delta_rule` for T = 1, with gradients; `rwkv7_op_rnn` is the same.

    Raises ArgumentError for another T.
    """
    del chunk_size
    function = "rnn_generalized_delta_rule"
    check_is_tensor(function, "r", r)
    length = r.shape[2 if head_first else 1] if r.dim() == 4 else 1
    if length != 1:
        raise ArgumentError(
            f"{function}: r has T={length}, but must have T=1; use generalized_delta_rule"
        )
    return delta_rule(
        function, (r, w, k, v, a, b), initial_state, output_final_state, head_first, None, head_size
    )


def rwkv6_op(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_map: torch.Tensor | Sequence[int] | None = None,
    head_first: bool = False,
    *,
    head_size: int = 64,
) -> Result:
    """RWKV-6 time mixing; `RWKV6_OP` is the same.

    r, k, v: [B, T, C], or [B, H, T, N] if head_first, one floating dtype.
    w: as r, same dtype or float32. The factor is d = exp(-exp(w)).
    u: [H, N] or [C], the dtype of r or float32; a keras variable of one will do.
    initial_state: [S, H, N, N] or [H, N, N], axes (key, value), any floating dtype. Zeros if None.
    output_final_state: whether to return the state after the last token.
    state_map: [B], integers, a tensor or a list: which of the S states each sequence begins with.
        Without it S is 1 or B.
    head_size: N; what a factory sets.

    Returns out, laid out as r and in its dtype, and if output_final_state the state [B, H, N, N],
    axes (key, value), float32; a tuple of both, or out alone. All floating inputs get gradients.
    Raises ArgumentError for tensors that do not fit.
    """
    function = "rwkv6_op"
    named = {"r": r, "w": w, "k": k, "v": v}
    if head_first:
        tokens = [time_first(function, name, x) for name, x in named.items()]
    else:
        tokens = [split_heads(function, name, x, head_size) for name, x in named.items()]
    u = split_channels(function, "u", getattr(u, "value", u), head_size)
    op = operator_for(function, "wkv6", tokens[0], head_size=head_size, state_layout="kv")
    state = chosen_states(function, initial_state, state_map, tokens[0])
    y, final_state = op(*tokens, u, as_state(op, state), output_final_state)
    y = y.transpose(1, 2) if head_first else y.flatten(2)
    return y if final_state is None else (y, final_state)


def get_generalized_delta_rule(
    HEAD_SIZE: int = 64, KERNEL_TYPE: str = "native", chunk_size: int = 16
) -> tuple[Callable[..., Result], Callable[..., Result]]:
    """`generalized_delta_rule` and `generalized_delta_rule_inference` for one head size."""
    del chunk_size
    _check_kernel_type("get_generalized_delta_rule", KERNEL_TYPE)
    return (
        functools.partial(generalized_delta_rule, head_size=HEAD_SIZE),
        functools.partial(generalized_delta_rule_inference, head_size=HEAD_SIZE),
    )


def get_rnn_generalized_delta_rule(
    HEAD_SIZE: int = 64, KERNEL_TYPE: str = "native", chunk_size: int = 16
) -> Callable[..., Result]:
    """`rnn_generalized_delta_rule` for one head size."""
    del chunk_size
    _check_kernel_type("get_rnn_generalized_delta_rule", KERNEL_TYPE)
    return functools.partial(rnn_generalized_delta_rule, head_size=HEAD_SIZE)


def get_rwkv6_kernel(
    HEAD_SIZE: int = 64, KERNEL_TYPE: str = "native", MAX_SEQUENCE_LENGTH: int = 4096
) -> Callable[..., Result]:
    """`rwkv6_op` for one head size, and any T."""
    del MAX_SEQUENCE_LENGTH
    _check_kernel_type("get_rwkv6_kernel", KERNEL_TYPE)
    return functools.partial(rwkv6_op, head_size=HEAD_SIZE)


rwkv7_op = generalized_delta_rule
rwkv7_op_inference = generalized_delta_rule_inference
rwkv7_op_rnn = rnn_generalized_delta_rule
RWKV6_OP = rwkv6_op


def _check_kernel_type(function: str, kernel_type: str) -> None:
    if kernel_type not in KERNEL_TYPES:
        raise ConfigError(
            f"{function}: KERNEL_TYPE={kernel_type!r} is not known; choose from "
            f"{', '.join(KERNEL_TYPES)}, which all mean the same here"
        )
