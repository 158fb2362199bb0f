"""Trial: build a small operator afresh, load it, run it, and compare it with its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arch import is_cuda
from ..build import build_many
from ..config import DEFAULT_CHUNK_LENGTH, OpConfig
from ..errors import RwkvJitError
from ..ops import get_spec
from ..render import render
from ..settings import Settings
from .warming import DEFAULT_HEAD_SIZE

_OP = "wkv7"
_INPUTS = ("r", "w", "k", "v", "a", "b")
# Keeps the rank-1 update smaller than what the decay takes away.
_SCALES = {"a": 0.1, "b": 0.1}
_LIMITS = {"bf16": 2e-2, "fp32": 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """error: the largest relative RMS error of an output or gradient, which is that of `worst`.
    limit: the largest that is right for the dtype."""

    slug: str
    build_seconds: float
    worst: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the limit."""
        return self.error <= self.limit


def run_trial(arch: str, settings: Settings) -> Trial:
    """Try the device at hand, of the architecture `arch`. Raises what building, loading and
    launching raise."""
    config = OpConfig(
        op=_OP,
        head_size=DEFAULT_HEAD_SIZE,
        dtype="bf16" if is_cuda(arch) else "fp32",
        chunk_length=DEFAULT_CHUNK_LENGTH,
        arch=arch,
    )
    spec = get_spec(config.op)
    sources = [render(spec, config, entry) for entry in spec.entries]
    seconds = 0.0
    for result in build_many(sources, settings, policy="always"):
        if isinstance(result, RwkvJitError):
            raise result
        seconds = max(seconds, result.manifest.build_seconds)
    errors = _errors(config)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Trial(
        slug=config.slug,
        build_seconds=seconds,
        worst=worst,
        error=errors[worst],
        limit=_LIMITS[config.dtype],
    )


def _errors(config: OpConfig) -> dict[str, float]:
    """Relative RMS errors of y, the final state and every gradient against the recurrence in
    float64, on random inputs of more tokens than a chunk."""
    import torch  # noqa: PLC0415

    from ..launch import TORCH_DTYPES  # noqa: PLC0415
    from ..reference import REFERENCES  # noqa: PLC0415
    from ..registry import get_op  # noqa: PLC0415

    device = "cuda" if is_cuda(config.arch) else "cpu"
    dtype = TORCH_DTYPES[config.dtype]
    op = get_op(config.op, head_size=config.head_size, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.chunk_length + 3, 2, config.head_size)
    drawn = [torch.randn(shape, generator=generator) * _SCALES.get(name, 1) for name in _INPUTS]
    ours = [x.to(device, dtype).requires_grad_() for x in drawn]
    exact = [x.detach().to("cpu", torch.float64).requires_grad_() for x in ours]
    results = []
    for function, inputs in ((op, ours), (REFERENCES[config.op], exact)):
        y, state = function(*inputs, output_final_state=True)
        assert state is not None, "it was asked for"
        (y.double().square().sum() + state.double().square().sum()).backward()
        outputs = [y, state, *(x.grad for x in inputs)]
        results.append([x.detach().double().cpu() for x in outputs if x is not None])
    names = ("y", "final_state", *(f"d{name}" for name in _INPUTS))
    return {
        name: ((mine - right).norm() / right.norm()).item()
        for name, mine, right in zip(names, *results, strict=True)
    }
