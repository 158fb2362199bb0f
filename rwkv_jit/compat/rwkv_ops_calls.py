"""rwkv_ops' calls on our operators: layouts, masks, and the states that sequences begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ArgumentError
from ..op import Op
from ..reference.decay import decay_factor
from .tensors import as_state, check_is_tensor, operator_for

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# As "loglog" has it, its decay factor is 1 in every dtype.
_NO_DECAY = -60.0


def delta_rule(
    function: str,
    tokens: Sequence[torch.Tensor],
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    head_first: bool,
    mask: torch.Tensor | None,
    head_size: int | None,
) -> Result:
    """RWKV-7 of the tokens r, w, k, v, a and b."""
    if head_first:
        tokens = [time_first(function, name, x) for name, x in zip("rwkvab", tokens, strict=True)]
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


def time_first(function: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, N] as [B, T, H, N]."""
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


def chosen_states(
    function: str,
    states: torch.Tensor | None,
    state_map: torch.Tensor | Sequence[int] | None,
    r: torch.Tensor,
) -> torch.Tensor | None:
    """The state of each sequence, out of `states` by `state_map`."""
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
