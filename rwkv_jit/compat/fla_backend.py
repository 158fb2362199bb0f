"""FLA 0.6.0's models on our kernels: a backend for FLA, by its own interface for backends."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..arguments import check_arguments
from ..errors import ArgumentError, ConfigError
from ..ops import get_spec
from . import fla
from .fla_calls import Result, declared_bound, refuse_context
from .tensors import as_state, operator_for

# Before FLA's other backends for NVIDIA GPUs, whose priority is 5.
_PRIORITY = 1
# The functions that FLA calls by name instead of dispatching them, by the module of the layer.
_CALLED_BY_NAME = {
    "rwkv6": ("chunk_rwkv6", "fused_recurrent_rwkv6"),
    "rwkv7": ("fused_mul_recurrent_rwkv7",),
}


def register() -> None:
    """Make FLA use these functions wherever they can serve a call; others stay FLA's own.

    `fla.ops.generalized_delta_rule.chunk_dplr_delta_rule`, and with it `chunk_rwkv7`, gets a
    backend. What FLA does not dispatch is replaced in the modules of its layers, if those are
    installed: `chunk_rwkv6`, `fused_recurrent_rwkv6`, `fused_mul_recurrent_rwkv7`. Calling
    this twice is calling it once.

    Raises ConfigError if FLA is not installed or has no such backends (before 0.6.0).
    """
    try:
        backends = importlib.import_module("fla.backends")
        add, base = backends.register, backends.BaseBackend
        importlib.import_module("fla.ops.generalized_delta_rule")
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"fla.register: FLA's backends cannot be used ({error}); "
            "install flash-linear-attention 0.6.0 or later"
        ) from error
    add("generalized_delta_rule.dplr")(_backend(base))
    for layer, names in _CALLED_BY_NAME.items():
        try:
            module = importlib.import_module(f"fla.layers.{layer}")
        except ModuleNotFoundError:
            continue
        theirs = importlib.import_module(f"fla.ops.{layer}")
        for name in names:
            setattr(module, name, _ours_if_possible(getattr(fla, name), getattr(theirs, name)))


def _backend(base: type[Any]) -> type[Any]:
    """A backend as FLA 0.6.0 has them: a method for each function, and one that accepts or refuses
    its arguments, an exception being a refusal."""

    class RwkvJitBackend(base):  # type: ignore[misc]
        backend_type = "rwkv_jit"
        priority = _PRIORITY
        chunk_dplr_delta_rule = staticmethod(fla.chunk_dplr_delta_rule)
        chunk_dplr_delta_rule_verifier = staticmethod(_verify)

    return RwkvJitBackend


def _verify(
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
) -> tuple[bool, str | None]:
    """Whether `chunk_dplr_delta_rule` takes these arguments; raises what it would."""
    del scale, output_final_state, cu_seqlens_cpu, chunk_size, disable_recompute
    function = "chunk_dplr_delta_rule"
    refuse_context(function, cp_context)
    if k.shape[-1] != v.shape[-1]:
        return False, "K is not V"
    bound = declared_bound(safe_gate, lower_bound)
    op = operator_for(function, "wkv7", q, decay="log", state_layout="kv", lower_bound=bound)
    named = {"r": q, "w": gk, "k": k, "v": v, "a": a, "b": b, "cu_seqlens": cu_seqlens}
    state = as_state(op, initial_state)
    check_arguments(get_spec("wkv7"), op.config, {**named, "initial_state": state})
    return True, None


def _ours_if_possible(
    ours: Callable[..., Result], theirs: Callable[..., Result]
) -> Callable[..., Result]:
    @functools.wraps(theirs)
    def either(*args: Any, **kwargs: Any) -> Result:
        try:
            return ours(*args, **kwargs)
        except (ArgumentError, ConfigError):
            return theirs(*args, **kwargs)

    return either
