"""Trial: build a small operator afresh, load it, run it, and compare it with its formula."""

from __future__ import annotations

from dataclasses import dataclass

from ..arch import is_cuda
from ..bench.cases import Shape
from ..build import build_many
from ..config import DEFAULT_CHUNK_LENGTH, OpConfig
from ..errors import RwkvJitError
from ..ops import get_spec
from ..render import render
from ..settings import Settings
from .planning import DEFAULT_HEAD_SIZE

_OP = "wkv7"


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
        """Whether the error is within the limit."""
        return self.error <= self.limit


def run_trial(arch: str, settings: Settings) -> Trial:
    """Try the device at hand, of the architecture `arch`. Raises what building, loading and
    launching raise."""
    from ..bench.gate import LIMITS, worst_of  # noqa: PLC0415

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
    worst = worst_of(errors)
    return Trial(
        slug=config.slug,
        build_seconds=seconds,
        worst=worst,
        error=errors[worst],
        limit=LIMITS[config.dtype],
    )


def _errors(config: OpConfig) -> dict[str, float]:
    """Relative RMS errors of y, the final state and every gradient against the recurrence in
    float64, on random inputs of more tokens than a chunk."""
    from ..bench.gate import relative_errors  # noqa: PLC0415
    from ..bench.inputs import draw  # noqa: PLC0415
    from ..launch import TORCH_DTYPES  # noqa: PLC0415
    from ..reference import REFERENCES  # noqa: PLC0415
    from ..registry import get_op  # noqa: PLC0415

    device = "cuda" if is_cuda(config.arch) else "cpu"
    dtype = TORCH_DTYPES[config.dtype]
    op = get_op(config.op, head_size=config.head_size, dtype=dtype, device=device)
    reference = REFERENCES[config.op]
    shape = Shape(1, config.chunk_length + 3, 2, config.head_size)
    return relative_errors(
        lambda tensors: op(**tensors, output_final_state=True),
        lambda tensors: reference(**tensors, output_final_state=True),
        draw(get_spec(config.op), config, shape, device),
        ("y", "final_state"),
    )
