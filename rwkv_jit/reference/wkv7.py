"""wkv7 token by token, from the formula of the RWKV-7 paper (Peng et al., 2025, section 4)."""

from __future__ import annotations

import itertools

import torch

from .decay import log_decay


def wkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    decay: str = "loglog",
    state_layout: str = "vk",
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t.

    r, w, k, v, a, b: [B, T, H, N], any floating dtype; computed in `compute_dtype`.
    initial_state: [B or S, H, N, N], in the order `state_layout`. Zeros if None.
    cu_seqlens: [S + 1], with B = 1.
    Returns y [B, T, H, N] and the final state [B or S, H, N, N], both in `compute_dtype`. Slow;
    differentiable by autograd, any number of times.
    """
    tokens = [x.to(compute_dtype) for x in (r, w, k, v, a, b)]
    if cu_seqlens is None:
        batches = [tokens]
        states = [initial_state]
    else:
        bounds = cu_seqlens.tolist()
        pieces = list(itertools.pairwise(bounds))
        batches = [[x[:, begin:end] for x in tokens] for begin, end in pieces]
        states = [
            None if initial_state is None else initial_state[s : s + 1] for s in range(len(pieces))
        ]
    outputs, finals = [], []
    for batch, state in zip(batches, states, strict=True):
        y, final = _sequence(batch, state, decay, state_layout)
        outputs.append(y)
        finals.append(final)
    heads, size = r.shape[2:]
    y = torch.cat(outputs, 1) if outputs else tokens[0].new_zeros(r.shape)
    final = torch.cat(finals) if finals else tokens[0].new_zeros(0, heads, size, size)
    return y, final if output_final_state else None


def _sequence(
    tokens: list[torch.Tensor], state: torch.Tensor | None, decay: str, state_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    r, w, k, v, a, b = tokens
    batch, _, heads, size = r.shape
    if state is None:
        s = r.new_zeros(batch, heads, size, size)
    else:
        s = state.to(r.dtype)
        s = s.transpose(-1, -2) if state_layout == "kv" else s
    d = torch.exp(log_decay(w, decay))
    outputs = []
    for r_t, d_t, k_t, v_t, a_t, b_t in zip(
        *(x.unbind(1) for x in (r, d, k, v, a, b)), strict=True
    ):
        sa = (s @ a_t[..., None]).squeeze(-1)
        s = (
            s * d_t[..., None, :]
            + sa[..., None] * b_t[..., None, :]
            + v_t[..., None] * k_t[..., None, :]
        )
        outputs.append((s @ r_t[..., None]).squeeze(-1))
    y = torch.stack(outputs, 1) if outputs else r.clone()
    return y, s.transpose(-1, -2) if state_layout == "kv" else s
