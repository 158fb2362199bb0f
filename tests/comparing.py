"""Comparing an operator with its float64 reference: one table of tolerances, one measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rwkv_jit import Op
from rwkv_jit.launch import TORCH_DTYPES
from rwkv_jit.ops import SPECS
from rwkv_jit.reference import REFERENCES

# Recurrences on whole sequences, and those for serving: a few tokens, or prompts.
SEQUENCE_OPS = tuple(
    name for name, spec in SPECS.items() if "forward" in spec.entries and spec.is_recurrence
)
DECODE_OPS = tuple(name for name, spec in SPECS.items() if "decode" in spec.entries)
PREFILL_OPS = tuple(name for name, spec in SPECS.items() if "prefill" in spec.entries)

# Relative RMS error allowed, by the operator's dtype or tf32: outputs, gradients, gradient of w.
TOLERANCES: Mapping[str, tuple[float, float, float]] = {
    "fp64": (1e-12, 1e-12, 1e-12),
    "fp32": (1e-5, 1e-5, 2e-5),
    "tf32": (7e-4, 1.5e-3, 1.5e-3),
    "fp16": (1e-3, 5e-3, 5e-3),
    "bf16": (4e-3, 1.2e-2, 1.2e-2),
}


def dtype_options(rounded_to: str) -> Mapping[str, Any]:
    """What get_op is asked for, by the name of a row of tolerances."""
    if rounded_to == "tf32":
        return {"dtype": torch.float32, "precision": "tf32"}
    return {"dtype": TORCH_DTYPES[rounded_to]}


@dataclass
class Call:
    """Arguments of one call of an operator and the gradients that flow into its results.

    Everything is in float64 until `rounded` makes it what an operator takes. `tokens` are its first
    arguments, those that are not of each token included.
    """

    tokens: dict[str, torch.Tensor]
    initial_state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    dy: torch.Tensor | None = None
    dfinal_state: torch.Tensor | None = None
    # Of w and of u, where it is not the operator's.
    w_dtype: torch.dtype | None = None
    results: dict[str, torch.Tensor] = field(default_factory=dict)

    def rounded(self, op: Op) -> Call:
        """This call in the dtypes of `op`."""
        dtype, state = TORCH_DTYPES[op.config.dtype], TORCH_DTYPES[op.config.state_dtype]
        tokens = {name: x.to(dtype) for name, x in self.tokens.items()}
        if self.w_dtype is not None:
            tokens["w"] = self.tokens["w"].to(self.w_dtype)
            if "u" in tokens:
                tokens["u"] = self.tokens["u"].to(self.w_dtype)
        return Call(
            tokens,
            None if self.initial_state is None else self.initial_state.to(state),
            self.cu_seqlens,
            None if self.dy is None else self.dy.to(dtype),
            None if self.dfinal_state is None else self.dfinal_state.to(state),
        )


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over RMS of the truth; infinite where value is not finite."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    difference = (value - truth).norm().item()
    return difference if difference == 0 else difference / max(truth.norm().item(), 1e-300)


def w_shape(op: str, batch: int, length: int, heads: int, size: int) -> tuple[int, ...]:
    """The shape of an operator's w."""
    return (heads, size) if op == "wkv5" else (batch, length, heads, size)


def of_each_token(x: torch.Tensor) -> bool:
    """Whether a tensor of `Call.tokens`, or its gradient, is [B, T, H, N]."""
    return x.dim() == 4


def random_call(
    batch: int,
    length: int,
    heads: int,
    size: int,
    *,
    op: str = "wkv7",
    w: torch.Tensor | None = None,
    sequences: int | None = None,
    identical: bool = False,
    state_scale: float = 1.0,
) -> Call:
    """Tokens as a model makes them: |a| = 1, b = -a * gate, and a state and gradients.

    w: of `w_shape`, or what broadcasts to it.
    """
    shape = (batch, length, heads, size)

    def draw(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, dtype=torch.float64)

    decays = w_shape(op, *shape)
    tokens = {
        "r": draw(*shape),
        "w": draw(*decays) - 1 if w is None else w.double().expand(decays),
        "k": draw(*shape),
        "v": draw(*shape),
    }
    if op == "wkv7_decode_fused":
        # Decays below 1 in every convention.
        tokens.update(a=draw(*shape), w0=-draw(heads, size).abs(), a0=draw(heads, size))
        tokens.update(k_k=draw(heads, size), k_a=draw(heads, size))
    elif op == "wkv7":
        kk = torch.nn.functional.normalize(draw(*shape), dim=-1)
        tokens.update(a=-kk, b=kk * torch.rand(shape, dtype=torch.float64))
    else:
        tokens["u"] = draw(heads, size)
    if identical:
        tokens = {
            name: x[:, :1].expand(shape) if of_each_token(x) else x for name, x in tokens.items()
        }
    states = (batch if sequences is None else sequences, heads, size, size)
    return Call(
        tokens,
        initial_state=draw(*states) * state_scale,
        dy=draw(*shape),
        dfinal_state=draw(*states),
    )


def run_step(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a call returns; several results side by side."""
    results = op(*args, **kwargs)
    return results if isinstance(results, torch.Tensor) else torch.cat(results, -1)


def run(op: Op, call: Call, device: str, *, gradients: bool = True) -> dict[str, torch.Tensor]:
    """Results and gradients of `op` for a rounded call, by name."""

    def place(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device).detach()

    tokens = {name: place(x) for name, x in call.tokens.items()}
    state = place(call.initial_state)
    leaves = {n: x for n, x in (*tokens.items(), ("initial_state", state)) if x is not None}
    for leaf in leaves.values():
        leaf.requires_grad_(gradients)
    y, final = op(
        **tokens, initial_state=state, output_final_state=True, cu_seqlens=place(call.cu_seqlens)
    )
    assert final is not None
    results = {"y": y, "final_state": final}
    if gradients:
        assert call.dy is not None
        assert call.dfinal_state is not None
        given = (call.dy.to(device), call.dfinal_state.to(device))
        grads = torch.autograd.grad((y, final), list(leaves.values()), given)
        results.update({f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return {name: x.detach() for name, x in results.items()}


def reference(op: Op, call: Call, *, gradients: bool = True) -> dict[str, torch.Tensor]:
    """The same from the float64 recurrence, on the CPU."""
    tokens = {n: x.double().detach().requires_grad_(gradients) for n, x in call.tokens.items()}
    state = call.initial_state
    leaves = dict(tokens)
    if state is not None:
        state = leaves["initial_state"] = state.double().detach().requires_grad_(gradients)
    y, final = REFERENCES[op.config.op](
        *tokens.values(),
        state,
        True,
        call.cu_seqlens,
        decay=op.config.decay,
        state_layout=op.config.state_layout,
    )
    assert final is not None
    results = {"y": y, "final_state": final}
    if gradients:
        assert call.dy is not None
        assert call.dfinal_state is not None
        given = (call.dy.double(), call.dfinal_state.double())
        grads = torch.autograd.grad((y, final), list(leaves.values()), given, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: x.detach() for name, x in results.items()}


def assert_matches_reference(
    op: Op, call: Call, device: str, *, within: Mapping[str, float] | None = None
) -> None:
    """Every result and gradient of `op` within the tolerance of its dtype, or that of `within`."""
    call = call.rounded(op)
    results, truth = run(op, call, device), reference(op, call)
    errors = {name: relative_rms(results[name], truth[name]) for name in truth}
    output, gradient, decay = TOLERANCES[op.config.rounded_to]
    bounds = {
        name: decay if name == "dw" else gradient if name.startswith("d") else output
        for name in truth
    }
    bounds.update(within or {})
    # A state stored in 16 bits is rounded as y is, whatever the operator computes in.
    for name in ("final_state", "dinitial_state"):
        bounds[name] = max(bounds.get(name, 0.0), TOLERANCES[op.config.state_dtype][0])
    bad = {name: f"{error:.2e}" for name, error in errors.items() if not error <= bounds[name]}
    assert not bad, f"{op.config.slug}: too large: {bad}"
