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
from ..op import Op
from ..reference.decay import decay_factor
from .tensors import as_state, check_is_tensor, operator_for, split_channels, split_heads

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

KERNEL_TYPES = ("native", "cuda", "triton")
# As "loglog" has it, its decay factor is 1 in every dtype.
_NO_DECAY = -60.0


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
    return _delta_rule(
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
    return _delta_rule(
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
    return _delta_rule(
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
        tokens = [_time_first(function, name, x) for name, x in named.items()]
    else:
        tokens = [split_heads(function, name, x, head_size) for name, x in named.items()]
    u = split_channels(function, "u", getattr(u, "value", u), head_size)
    op = operator_for(function, "wkv6", tokens[0], head_size=head_size, state_layout="kv")
    state = _chosen_states(function, initial_state, state_map, tokens[0])
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


def _delta_rule(
    function: str,
    tokens: Sequence[torch.Tensor],
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    head_first: bool,
    mask: torch.Tensor | None,
    head_size: int | None,
) -> Result:
    if head_first:
        tokens = [_time_first(function, name, x) for name, x in zip("rwkvab", tokens, strict=True)]
    op = operator_for(function, "wkv7", tokens[0], head_size=head_size)
    state = _state_of_each(as_state(op, initial_state), tokens[0])
    if mask is None:
        y, final_state = op(*tokens, state, output_final_state)
    else:
        y, final_state = _masked(function, op, tokens, state, output_final_state, mask)
    y = y.transpose(1, 2) if head_first else y
    return y if final_state is None else (y, final_state)


def _masked(
    function: str,
    op: Op,
    tokens: Sequence[torch.Tensor],
    state: torch.Tensor | None,
    output_final_state: bool,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A masked token is one without decay, k and a. What it would have made of the state S before
    it, S diag(d) + S a b^T + v k^T, times r, is S (d r + (b . r) a) + (k . r) v: another r and a
    term without a state."""
    r, w, k, v, a, b = tokens
    check_is_tensor(function, "mask", mask)
    if mask.shape not in (r.shape[:2], (*r.shape[:2], 1, 1)):
        raise ArgumentError(
            f"{function}: mask has shape {list(mask.shape)}, but must be [B, T] with "
            f"B={r.shape[0]} and T={r.shape[1]}; reshape it"
        )
    masked = mask.reshape(*r.shape[:2], 1, 1).to(r.device) <= 0
    wide = torch.promote_types(r.dtype, torch.float32)
    d, wide_r, wide_a = decay_factor(w.to(wide), "loglog"), r.to(wide), a.to(wide)
    asked = d * wide_r + (b * wide_r).sum(-1, keepdim=True) * wide_a
    added = (k * wide_r).sum(-1, keepdim=True) * v
    y, final_state = op(
        torch.where(masked, asked.to(r.dtype), r), w.masked_fill(masked, _NO_DECAY),
        k.masked_fill(masked, 0), v, a.masked_fill(masked, 0), b, state, output_final_state,
    )  # fmt: skip
    return torch.where(masked, (y + added).to(y.dtype), y), final_state


def _time_first(function: str, name: str, x: torch.Tensor) -> torch.Tensor:
    check_is_tensor(function, name, x)
    if x.dim() != 4:
        raise ArgumentError(
            f"{function}: {name} has shape {list(x.shape)}, but with head_first=True must be "
            "[B, H, T, N]; reshape it"
        )
    return x.transpose(1, 2)


def _state_of_each(state: torch.Tensor | None, r: torch.Tensor) -> torch.Tensor | None:
    """One state stands for those of all sequences."""
    if isinstance(state, torch.Tensor) and state.dim() == 4 and state.shape[0] == 1:
        return state.expand(r.shape[0], -1, -1, -1)
    return state


def _chosen_states(
    function: str,
    states: torch.Tensor | None,
    state_map: torch.Tensor | Sequence[int] | None,
    r: torch.Tensor,
) -> torch.Tensor | None:
    if isinstance(states, torch.Tensor) and states.dim() == 3:
        states = states[None]
    if state_map is None:
        return _state_of_each(states, r)
    if states is None:
        raise ArgumentError(
            f"{function}: state_map is given, but initial_state is None; pass the states or no map"
        )
    check_is_tensor(function, "initial_state", states)
    chosen = torch.as_tensor(state_map, device=states.device)
    if chosen.shape != r.shape[:1] or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ArgumentError(
            f"{function}: state_map has shape {list(chosen.shape)} and dtype {chosen.dtype}, but "
            f"must be [B] with B={r.shape[0]}, integers; one for each sequence"
        )
    # On a GPU the values are not looked at, which would wait for the device.
    if chosen.device.type == "cpu" and not all(0 <= s < states.shape[0] for s in chosen.tolist()):
        raise ArgumentError(
            f"{function}: state_map={chosen.tolist()} must lie in 0 to {states.shape[0] - 1}, "
            "the states in initial_state; pass more of them or another map"
        )
    return states.index_select(0, chosen.long())


def _check_kernel_type(function: str, kernel_type: str) -> None:
    if kernel_type not in KERNEL_TYPES:
        raise ConfigError(
            f"{function}: KERNEL_TYPE={kernel_type!r} is not known; choose from "
            f"{', '.join(KERNEL_TYPES)}, which all mean the same here"
        )
