"""FLA's calls on our operators, whose states are square."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .tensors import as_state, check_is_tensor, operator_for

Result = tuple[torch.Tensor, torch.Tensor | None]

# What safe_gate=True says of log decays, as FLA documents it.
_SAFE_GATE_BOUND = -5.0


def rwkv6(
    function: str,
    tokens: tuple[torch.Tensor, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> Result:
    """RWKV-6 of the tokens r, w, k, v and u."""
    named = dict(zip("rwkvu", tokens, strict=True))
    return _run(function, "wkv6", named, scale, initial_state, output_final_state, cu_seqlens, None)


def rwkv7(
    function: str,
    tokens: tuple[torch.Tensor, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    lower_bound: float | None = None,
) -> Result:
    """RWKV-7 of the tokens r, w, k, v, a and b."""
    named = dict(zip("rwkvab", tokens, strict=True))
    return _run(
        function, "wkv7", named, scale, initial_state, output_final_state, cu_seqlens, lower_bound
    )


def _run(
    function: str,
    name: str,
    tokens: dict[str, torch.Tensor],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    lower_bound: float | None,
) -> Result:
    keys, values = _widths(function, tokens)
    size = max(keys, values)
    op = operator_for(
        function, name, tokens["r"], head_size=size, decay="log", state_layout="kv",
        lower_bound=lower_bound,
    )  # fmt: skip
    state = as_state(op, initial_state)
    scale = keys**-0.5 if scale is None else scale
    if scale != 1.0:
        tokens["r"] = tokens["r"] * scale
    if keys == values:
        return op(*tokens.values(), state, output_final_state, cu_seqlens)
    # Zeros in k and v leave their rows and columns of the state zero, whatever the decay.
    padded = [_padded(x, x.dim() - 1, size) for x in tokens.values()]
    if state is not None:
        _check_state(function, state, keys, values)
        state = _padded(_padded(state, 2, size), 3, size)
    o, final_state = op(*padded, state, output_final_state, cu_seqlens)
    if final_state is not None:
        final_state = final_state[:, :, :keys, :values]
    return o[..., :values], final_state


def _widths(function: str, tokens: dict[str, torch.Tensor]) -> tuple[int, int]:
    """K and V; where they differ, every tensor has that which it should."""
    for name, x in tokens.items():
        check_is_tensor(function, name, x)
    k, v = tokens["k"], tokens["v"]
    keys, values = (x.shape[-1] if x.dim() else 0 for x in (k, v))
    if keys != values:
        for name, x in tokens.items():
            if name != "v" and x.shape[-1:] != k.shape[-1:]:
                raise ArgumentError(
                    f"{function}: {name} has shape {list(x.shape)}, but k has K={keys} in "
                    "[B, T, H, K], and only v may be of another width"
                )
    return keys, values


def _check_state(function: str, state: torch.Tensor, keys: int, values: int) -> None:
    if state.shape[2:] != (keys, values):
        raise ArgumentError(
            f"{function}: initial_state has shape {list(state.shape)}, but must be [B, H, K, V] "
            f"with K={keys} and V={values}"
        )


def _padded(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """With zeros up to `size` along an axis."""
    missing = size - x.shape[axis]
    if missing == 0:
        return x
    return torch.nn.functional.pad(x, (*[0] * (2 * (x.dim() - 1 - axis) + 1), missing))


def declared_bound(safe_gate: bool, lower_bound: float | None) -> float | None:
    """What no log decay is below, as FLA's arguments have it."""
    return _SAFE_GATE_BOUND if safe_gate and lower_bound is None else lower_bound


def refuse_reverse(function: str, reverse: bool) -> None:
    """Raise ArgumentError for a sequence that is read backwards."""
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
