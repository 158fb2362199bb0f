"""The tensors that every recurrence has, and those made from others."""

from __future__ import annotations

from ..spec import TensorSpec

TOKENS = ("B", "T", "H", "N")
STATE = ("S", "H", "N", "N")


def token(name: str, meaning: str) -> TensorSpec:
    """A vector a token and head, in the operator's dtype."""
    return TensorSpec(name=name, shape=TOKENS, dtype=("op",), meaning=meaning)


def state(name: str, meaning: str) -> TensorSpec:
    """A state that goes in or out."""
    return TensorSpec(name=name, shape=STATE, dtype=("state",), meaning=meaning, optional=True)


def gradient(of: TensorSpec) -> TensorSpec:
    """The gradient of an input."""
    like = f"like:{of.name}" if len(of.dtype) > 1 else of.dtype[0]
    return TensorSpec(
        name=f"d{of.name}", shape=of.shape, dtype=(like,), meaning=f"gradient of {of.name}"
    )


R = token("r", "receptance")
W = TensorSpec(name="w", shape=TOKENS, dtype=("op", "fp32"), meaning="decay, see decay=")
K = token("k", "key")
V = token("v", "value")
Y = token("y", "output")
DY = token("dy", "gradient of y")
CU_SEQLENS = TensorSpec(
    name="cu_seqlens",
    shape=("S+1",),
    dtype=("int32", "int64"),
    meaning="where each packed sequence begins, and the end of the last",
    optional=True,
)
CHECKPOINTS = TensorSpec(
    name="checkpoints",
    shape=("K", "H", "N", "N"),
    dtype=("checkpoint",),
    meaning="the state before each chunk, in the kernel's own order",
    optional=True,
)
INITIAL_STATE = state("initial_state", "state before the first token; zeros if None")
FINAL_STATE = state("final_state", "state after the last token")
DFINAL_STATE = state("dfinal_state", "gradient of final_state; zeros if None")
DINITIAL_STATE = state("dinitial_state", "gradient of initial_state")
