"""FLA 0.6.0's functions for RWKV-6 and RWKV-7 (flash-linear-attention), with its arguments.

What differs from upstream: the widths of keys and values must be the same (K = V = N); every
function has gradients; float32 is as good as the others; a CPU will do. Of FLA's arguments,
`cu_seqlens_cpu`, `chunk_size` and `disable_recompute` say how to compute, not what: they are
accepted without effect. `reverse` and `cp_context` are refused.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from ..op import Op
from .tensors import as_state, check_is_tensor, operator_for

Result = tuple[torch.Tensor, torch.Tensor | None]

# What safe_gate=True says of log decays, as FLA documents it.
_SAFE_GATE_BOUND = -5.0


def chunk_rwkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> Result:
    """RWKV-6 time mixing.

    r, k, v: [B, T, H, N], one dtype: float32, float16 or bfloat16.
    w: [B, T, H, N], same dtype or float32. The logarithm of the decay: d = exp(w).
    u: [H, N], same dtype or float32. The bonus.
    scale: of r; N^-0.5 if None.
    initial_state: [B or S, H, N, N], axes (key, value), any floating dtype. Zeros if None.
    output_final_state: whether to return the state after the last token.
    cu_seqlens: [S + 1], int32 or int64, with B = 1: sequences packed one after another.
    cu_seqlens_cpu, chunk_size: without effect.

    Returns o [B, T, H, N] in the dtype of r and the final state [B or S, H, N, N], axes
    (key, value), float32, or None. All floating inputs get gradients. Raises ArgumentError for
    tensors that do not fit.
    """
    del cu_seqlens_cpu, chunk_size
    return _rwkv6("chunk_rwkv6", (r, w, k, v, u), scale, initial_state, output_final_state,
                  cu_seqlens)  # fmt: skip


def fused_recurrent_rwkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """`chunk_rwkv6` under another name. reverse: must be False."""
    function = "fused_recurrent_rwkv6"
    _refuse_reverse(function, reverse)
    return _rwkv6(function, (r, w, k, v, u), scale, initial_state, output_final_state, cu_seqlens)


def chunk_rwkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = 1.0,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object = None,
    lower_bound: float | None = None,
) -> Result:
    """RWKV-7 time mixing.

    r, k, v, a, b: [B, T, H, N], one dtype: float32, float16 or bfloat16.
    w: [B, T, H, N], same dtype or float32. The logarithm of the decay: d = exp(w).
    scale: of r; N^-0.5 if None.
    initial_state: [B or S, H, N, N], axes (key, value), any floating dtype. Zeros if None.
    output_final_state: whether to return the state after the last token.
    cu_seqlens: [S + 1], int32 or int64, with B = 1: sequences packed one after another.
    safe_gate: says that no w is below -5.
    lower_bound: what no w is below, rather than that; see `rwkv_jit.get_op`.
    cu_seqlens_cpu, chunk_size, disable_recompute: without effect.
    cp_context: must be None.

    Returns o [B, T, H, N] in the dtype of r and the final state [B or S, H, N, N], axes
    (key, value), float32, or None. All floating inputs get gradients. Raises ArgumentError for
    tensors that do not fit.
    """
    del cu_seqlens_cpu, chunk_size, disable_recompute
    function = "chunk_rwkv7"
    refuse_context(function, cp_context)
    return _rwkv7(
        function, (r, w, k, v, a, b), scale, initial_state, output_final_state, cu_seqlens,
        declared_bound(safe_gate, lower_bound),
    )  # fmt: skip


def fused_recurrent_rwkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """`chunk_rwkv7` with other defaults: scale=None is N^-0.5, and the final state is returned."""
    return _rwkv7(
        "fused_recurrent_rwkv7", (r, w, k, v, a, b), scale, initial_state, output_final_state,
        cu_seqlens,
    )  # fmt: skip


def fused_mul_recurrent_rwkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kk: torch.Tensor,
    a: torch.Tensor,
    scale: float | None = 1.0,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """`chunk_rwkv7` from the normalised key kk and the gate a of the rank-1 update, whose vectors
    are -kk and kk * a, both [B, T, H, N]. reverse: must be False."""
    function = "fused_mul_recurrent_rwkv7"
    _refuse_reverse(function, reverse)
    for name, x in (("kk", kk), ("a", a)):
        check_is_tensor(function, name, x)
    return _rwkv7(
        function, (r, w, k, v, -kk, kk * a), scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_dplr_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    gk: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object = None,
    lower_bound: float | None = None,
) -> Result:
    """`chunk_rwkv7` with r called q, w called gk, and scale=None for N^-0.5 as the default."""
    del cu_seqlens_cpu, chunk_size, disable_recompute
    function = "chunk_dplr_delta_rule"
    refuse_context(function, cp_context)
    return _rwkv7(
        function, (q, gk, k, v, a, b), scale, initial_state, output_final_state, cu_seqlens,
        declared_bound(safe_gate, lower_bound),
    )  # fmt: skip


def _rwkv6(
    function: str,
    tokens: tuple[torch.Tensor, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    r, w, k, v, u = tokens
    op = operator(function, "wkv6", r, k, v, None)
    state = as_state(op, initial_state)
    return op(_scaled(r, scale), w, k, v, u, state, output_final_state, cu_seqlens)


def _rwkv7(
    function: str,
    tokens: tuple[torch.Tensor, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    lower_bound: float | None = None,
) -> Result:
    r, w, k, v, a, b = tokens
    op = operator(function, "wkv7", r, k, v, lower_bound)
    state = as_state(op, initial_state)
    return op(_scaled(r, scale), w, k, v, a, b, state, output_final_state, cu_seqlens)


def operator(
    function: str,
    name: str,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lower_bound: float | None,
) -> Op:
    """The operator for FLA's conventions. Raises ArgumentError where K is not V."""
    op = operator_for(function, name, r, decay="log", state_layout="kv", lower_bound=lower_bound)
    for other, x in (("k", k), ("v", v)):
        check_is_tensor(function, other, x)
    if v.shape[-1:] != k.shape[-1:]:
        raise ArgumentError(
            f"{function}: v has V={v.shape[-1]} in [B, T, H, V], but k has K={k.shape[-1]}, and "
            "kernels have square states; pad the narrower of the two with zeros, or make a model "
            "with K = V (expand_k=1.0 in RWKV6Config)"
        )
    return op


def _scaled(r: torch.Tensor, scale: float | None) -> torch.Tensor:
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    return r if scale == 1.0 else r * scale


def declared_bound(safe_gate: bool, lower_bound: float | None) -> float | None:
    """What no log decay is below, as FLA's arguments have it."""
    return _SAFE_GATE_BOUND if safe_gate and lower_bound is None else lower_bound


def _refuse_reverse(function: str, reverse: bool) -> None:
    if reverse:
        raise ArgumentError(
            f"{function}: reverse=True is not supported; flip the tokens along T, and o back"
        )


def refuse_context(function: str, cp_context: object) -> None:
    """Raise ArgumentError for a sequence that is split over processes."""
    if cp_context is not None:
        raise ArgumentError(
            f"{function}: cp_context is not supported; pass None, each process has whole sequences"
        )
