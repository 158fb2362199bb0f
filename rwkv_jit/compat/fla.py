"""FLA 0.6.0's functions for RWKV-6 and RWKV-7 (flash-linear-attention), with its arguments.

Letters are FLA's: K is the width of keys and V that of values, usually the same. Kernels are
square: where K and V differ the narrower tensors are padded with zeros, exactly.

What differs from upstream: every function has gradients; float32 is as good as the others; a CPU
will do. Of FLA's arguments, `cu_seqlens_cpu`, `chunk_size` and `disable_recompute` say how to
compute, not what: they are accepted without effect. `reverse` and `cp_context` are refused.
"""

from __future__ import annotations

import torch

from .fla_calls import Result, declared_bound, refuse_context, refuse_reverse, rwkv6, rwkv7
from .fla_steps import (
    channel_mixing_rwkv7,
    fused_addcmul_rwkv7,
    fused_k_rwkv7,
    gate_output_correction,
)
from .tensors import check_is_tensor

__all__ = (
    "channel_mixing_rwkv7",
    "chunk_dplr_delta_rule",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "fused_addcmul_rwkv7",
    "fused_k_rwkv7",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "gate_output_correction",
)


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

    r, k: [B, T, H, K]; v: [B, T, H, V]. One dtype: float32, float16 or bfloat16.
    w: [B, T, H, K], same dtype or float32. The logarithm of the decay: d = exp(w).
    u: [H, K], same dtype or float32. The bonus.
    scale: of r; K^-0.5 if None.
    initial_state: [B or S, H, K, V], axes (key, value), any floating dtype. Zeros if None.
    output_final_state: whether to return the state after the last token.
    cu_seqlens: [S + 1], int32 or int64, with B = 1: sequences packed one after another.
    cu_seqlens_cpu, chunk_size: without effect.

    Returns o [B, T, H, V] in the dtype of r and the final state [B or S, H, K, V], axes
    (key, value), float32, or None. All floating inputs get gradients. Raises ArgumentError for
    tensors that do not fit.
    """
    del cu_seqlens_cpu, chunk_size
    return rwkv6("chunk_rwkv6", (r, w, k, v, u), scale, initial_state, output_final_state,
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
    refuse_reverse(function, reverse)
    return rwkv6(function, (r, w, k, v, u), scale, initial_state, output_final_state, cu_seqlens)


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

    r, k, a, b: [B, T, H, K]; v: [B, T, H, V]. One dtype: float32, float16 or bfloat16.
    w: [B, T, H, K], same dtype or float32. The logarithm of the decay: d = exp(w).
    scale: of r; K^-0.5 if None.
    initial_state: [B or S, H, K, V], axes (key, value), any floating dtype. Zeros if None.
    output_final_state: whether to return the state after the last token.
    cu_seqlens: [S + 1], int32 or int64, with B = 1: sequences packed one after another.
    safe_gate: says that no w is below -5.
    lower_bound: what no w is below, rather than that; see `rwkv_jit.get_op`.
    cu_seqlens_cpu, chunk_size, disable_recompute: without effect.
    cp_context: must be None.

    Returns o [B, T, H, V] in the dtype of r and the final state [B or S, H, K, V], axes
    (key, value), float32, or None. All floating inputs get gradients. Raises ArgumentError for
    tensors that do not fit.
    """
    del cu_seqlens_cpu, chunk_size, disable_recompute
    function = "chunk_rwkv7"
    refuse_context(function, cp_context)
    return rwkv7(
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
    """`chunk_rwkv7` with other defaults: scale=None is K^-0.5, and the final state is returned."""
    return rwkv7(
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
    are -kk and kk * a, both [B, T, H, K]. reverse: must be False."""
    function = "fused_mul_recurrent_rwkv7"
    refuse_reverse(function, reverse)
    for name, x in (("kk", kk), ("a", a)):
        check_is_tensor(function, name, x)
    return rwkv7(
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
    """`chunk_rwkv7` with r called q, w called gk, and scale=None for K^-0.5 as the default."""
    del cu_seqlens_cpu, chunk_size, disable_recompute
    function = "chunk_dplr_delta_rule"
    refuse_context(function, cp_context)
    return rwkv7(
        function, (q, gk, k, v, a, b), scale, initial_state, output_final_state, cu_seqlens,
        declared_bound(safe_gate, lower_bound),
    )  # fmt: skip
