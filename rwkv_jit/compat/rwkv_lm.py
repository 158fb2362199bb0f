"""The functions of RWKV-LM, RWKV-CUDA, RWKV-PEFT and the `rwkv` package, on our operators.

Names, arguments and results are theirs. Tokens are [B, T, C] in one of bfloat16, float16, float32
(float64 on a CPU), on any device that `get_op` serves, with any strides and any T; heads are
C // N, and states are [H, N, N] or [B, H, N, N] with axes (value, key) where nothing else is said.
All floating inputs get gradients. Decays are raw: "loglog", d = exp(-exp(w)), or for the clamped
functions "logit", d = exp(-exp(-1/2) sigmoid(w)). Raises ArgumentError for tensors that do not fit,
and what `get_op` and its operators raise.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentError
from .channels import run_op, with_bonus, without_bonus
from .tensors import batched_state, check_is_tensor, split_heads


def RUN_CUDA_RWKV7g(  # noqa: N802
    q: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    HEAD_SIZE: int = 64,
) -> torch.Tensor:
    """RWKV-7 from a zero state.

    q: [B, T, C], the receptance; w: the decay, "loglog", same dtype or float32; k, v, a, b: alike.

    Returns y [B, T, C]. Upstream: bfloat16 and T % 16 == 0 alone.
    """
    return without_bonus("RUN_CUDA_RWKV7g", (q, w, k, v, a, b), HEAD_SIZE, names="qwkvab")[0]


def RWKV7_CLAMPW_CUDA(  # noqa: N802
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    HEAD_SIZE: int = 64,
) -> torch.Tensor:
    """RWKV-7 from a zero state, with bounded decays: as RUN_CUDA_RWKV7g, but w is "logit"."""
    return without_bonus("RWKV7_CLAMPW_CUDA", (r, w, k, v, a, b), HEAD_SIZE, decay="logit")[0]


def RWKV7_STATE_CLAMPW_CUDA(  # noqa: N802
    s0: torch.Tensor,
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    HEAD_SIZE: int = 64,
) -> torch.Tensor:
    """RWKV-7 from the state s0, [H, N, N] or [B, H, N, N], with decays "logit".

    Returns y [B, T, C]. Upstream takes [B, H, N, N] in float32 alone.
    """
    return without_bonus(
        "RWKV7_STATE_CLAMPW_CUDA", (r, w, k, v, a, b), HEAD_SIZE, decay="logit", s0=s0
    )[0]  # fmt: skip


def RWKV7_STATE_PASSING_CLAMPW_CUDA(  # noqa: N802
    s0: torch.Tensor,
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    HEAD_SIZE: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As RWKV7_STATE_CLAMPW_CUDA, but returns (y, the state after the last token).

    The state is [B, H, N, N] in float32 (float64 for float64).
    """
    return without_bonus(
        "RWKV7_STATE_PASSING_CLAMPW_CUDA", (r, w, k, v, a, b), HEAD_SIZE, decay="logit", s0=s0
    )  # fmt: skip


def RUN_RWKV7_STATE(  # noqa: N802
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    HEAD_SIZE: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-PEFT's state tuning: RWKV-7 from the state s, with decays "loglog". Mind the order of
    the arguments, w after v.

    Returns (y [B, T, C], the final state [B, H, N, N]). Upstream, y is [B, T, H, N] or the state is
    None, depending on what it runs on.
    """
    return without_bonus("RUN_RWKV7_STATE", (r, w, k, v, a, b), HEAD_SIZE, s0=s, state_name="s")


def RUN_RWKV7_INFCTX(  # noqa: N802
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    HEAD_SIZE: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-PEFT's training over a long context in pieces: as RUN_RWKV7_STATE, but states have axes
    (key, value), as FLA's, on which upstream runs this one."""
    return without_bonus(
        "RUN_RWKV7_INFCTX", (r, w, k, v, a, b), HEAD_SIZE, s0=s, state_name="s", state_layout="kv"
    )  # fmt: skip


@torch.no_grad()
def RWKV7_OP(  # noqa: N802
    state: torch.Tensor,
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    """The `rwkv` package's RWKV-7: one sequence, from a state that is updated in place.

    state: [H, N, N] (value, key), float32; what is written back is the state after the last token.
    r, w, k, v, a, b: [T, C]; w is "loglog". N is that of the state.

    Returns y [T, C]. No gradients, as upstream.
    """
    check_is_tensor("RWKV7_OP", "state", state)
    if state.dim() != 3:
        raise ArgumentError(f"RWKV7_OP: state has shape {list(state.shape)}, but must be [H, N, N]")
    values = [
        split_heads("RWKV7_OP", name, x, state.shape[-1], "[T, C]")[None]
        for name, x in zip("rwkvab", (r, w, k, v, a, b), strict=True)
    ]
    y, final_state = run_op("wkv7", values, batched_state("RWKV7_OP", "state", state, values[0]))
    state.copy_(final_state[0])
    return y[0].flatten(-2)


def RUN_CUDA_RWKV6(  # noqa: N802
    *args: Any, w: Any = None, u: Any = None, HEAD_SIZE: int = 64
) -> torch.Tensor:
    """RWKV-6 from a zero state, of (r, k, v, w, u) or (B, T, C, H, r, k, v, w, u).

    r, k, v: [B, T, C]; w: the decay, "loglog", alike, same dtype or float32.
    u: [H, N], same dtype or float32.
    HEAD_SIZE: N, where B, T, C, H are not given, which say it.

    Returns y [B, T, C]. Upstream: bfloat16 alone, T at most what it was compiled for.
    """
    name = "RUN_CUDA_RWKV6"
    sizes, rest = args[:4], args[4:]
    if args and isinstance(args[0], torch.Tensor):
        sizes, rest = (), args
    named = {key: x for key, x in (("w", w), ("u", u)) if x is not None}
    given = {**dict(zip("rkvwu", rest, strict=False)), **named}
    if len(given) != 5 or len(rest) + len(named) != 5:
        raise ArgumentError(
            f"{name}: takes r, k, v, w and u, or B, T, C, H before them, but {len(args)} arguments "
            "were given in order"
        )
    if not sizes:
        batch, length, heads, size = split_heads(name, "r", given["r"], HEAD_SIZE).shape
        sizes = (batch, length, heads * size, heads)
    return with_bonus(name, "wkv6", sizes, given)[0]


def RUN_CUDA_RWKV6_STATE(  # noqa: N802
    B: int,
    T: int,
    C: int,
    H: int,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    s: torch.Tensor,
    *,
    output_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RWKV-6 from the state s, [H, N, N] or [B, H, N, N] (value, key), of any floating dtype.

    The rest as for RUN_CUDA_RWKV6. Returns y [B, T, C], or with output_final_state, which upstream
    has not, (y, the final state [B, H, N, N] in float32).
    """
    tokens = {"r": r, "k": k, "v": v, "w": w, "u": u}
    y, final_state = with_bonus("RUN_CUDA_RWKV6_STATE", "wkv6", (B, T, C, H), tokens, s)
    return (y, final_state) if output_final_state else y


def RUN_CUDA_RWKV5(  # noqa: N802
    B: int,
    T: int,
    C: int,
    H: int,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
) -> torch.Tensor:
    """RWKV-5 from a zero state.

    r, k, v: [B, T, C].
    w: [H, N], the decay, "loglog"; u: [H, N]; each in the same dtype or float32.

    Returns y [B, T, C]. Upstream: bfloat16 alone.
    """
    tokens = {"r": r, "k": k, "v": v, "w": w, "u": u}
    return with_bonus("RUN_CUDA_RWKV5", "wkv5", (B, T, C, H), tokens)[0]
