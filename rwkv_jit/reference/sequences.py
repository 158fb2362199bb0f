"""Sequences and states, the same for every recurrence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

Result = tuple[torch.Tensor, torch.Tensor | None]
# From a token's vectors, each [B, H, N], and the state [B, H, N, N], axes (value, key), to the
# token's output [B, H, N] and the next state.
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def run_sequences(
    step: Step,
    tokens: Sequence[torch.Tensor],
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take states through their tokens, one after another.

    tokens: each [B, T, H, N], in the order in which `step` takes them after the state.
    initial_state: [B or S, H, N, N], in the order `state_layout`. Zeros if None.
    cu_seqlens: [S + 1], with B = 1. The y of tokens behind the last is 0.
    Returns y [B, T, H, N] and the final state [B or S, H, N, N].
    """
    like = tokens[0]
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    batch, _, heads, size = like.shape
    states = batch if bounds is None else len(bounds) - 1
    if initial_state is None:
        initial_state = like.new_zeros(states, heads, size, size)
    state = _turned(initial_state.to(like.dtype), state_layout)
    if bounds is None:
        y, final = _run(step, tokens, state)
    else:
        results = [
            _run(step, [x[:, begin:end] for x in tokens], state[s : s + 1])
            for s, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
        rest = torch.zeros_like(like[:, bounds[-1] :])
        y = torch.cat([*(y for y, _ in results), rest], 1)
        final = torch.cat([final for _, final in results]) if results else state
    return y, _turned(final, state_layout)


def _run(
    step: Step, tokens: Sequence[torch.Tensor], state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for token in zip(*(x.unbind(1) for x in tokens), strict=True):
        y, state = step(state, *token)
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else tokens[0].clone(), state


def _turned(state: torch.Tensor, state_layout: str) -> torch.Tensor:
    return state.transpose(-1, -2) if state_layout == "kv" else state
