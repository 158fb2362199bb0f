"""Contenders: what can be measured on the inputs of an operator. Ours, the loop, and peers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..arch import is_cuda
from ..config import OpConfig, bounded_from
from ..errors import BenchError
from ..launch import TORCH_DTYPES
from ..ops import get_spec
from ..reference import REFERENCES
from ..registry import get_op
from ..settings import current_settings
from ..spec import OpSpec
from .cases import Case
from .gate import LIMITS
from .inputs import Tensors

Call = Callable[[Tensors], Sequence[torch.Tensor]]

OURS = "rwkv_jit"
LOOP = "loop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Something that computes what an operator does.

    call: takes the operator's tensors by name; differentiable. Returns y, or each result of a step
        that has several.
    config: what those are like: dtypes, and what w means.
    limit: the largest error that the gate lets pass.
    kernels: for each entry the template that serves it, of ours.
    """

    name: str
    call: Call
    config: OpConfig
    limit: float
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Absentee:
    """A peer that cannot be measured, and why not. status: "missing" or "failed"."""

    name: str
    status: str
    why: str


def line_up(
    case: Case, device: str, *, known_peers: bool, peer_files: Sequence[Path]
) -> list[Contender | Absentee]:
    """What is measured in a case, ours first; on a CPU the loop is next. Raises ConfigError for
    what no kernel of ours serves."""
    first = ours(case, device)
    found: list[Contender | Absentee] = [first]
    if device == "cpu" and not is_serving(case.op):
        found.append(loop(first.config))
    if known_peers:
        found.extend(peers(first.config))
    own = (peer_of_file(path, first.config) for path in peer_files)
    return [*found, *(peer for peer in own if peer is not None)]


def is_serving(op: str) -> bool:
    """Whether an operator is one for serving, on a pool of states and without gradients."""
    return get_spec(op).is_serving


def ours(case: Case, device: str) -> Contender:
    """The operator of this package. Raises ConfigError for what no kernel serves."""
    if current_settings().mode == "reference":
        raise BenchError("RWKV_JIT_MODE=reference runs no kernels; unset it to measure them")
    spec = get_spec(case.op)
    op = get_op(
        case.op,
        head_size=case.shape.head_size if "head_size" in spec.knobs else None,
        dtype=TORCH_DTYPES[case.dtype],
        device=device,
        decay=spec.decays[0],
        precision=case.precision,
        lower_bound=bounded_from(case.dtype) if case.bounded else None,
        state_dtype=TORCH_DTYPES[case.state_dtype] if case.state_dtype else None,
    )

    def call(tensors: Tensors) -> Sequence[torch.Tensor]:
        results: Any = op(**tensors)
        return _compared(spec, results)

    return Contender(
        name=OURS,
        call=call,
        config=op.config,
        # A state of 16 bits is rounded as y is.
        limit=max(LIMITS[op.config.rounded_to], LIMITS[op.config.state_dtype]),
        kernels={entry: spec.variant(op.config, entry).template for entry in spec.entries},
    )


def loop(config: OpConfig) -> Contender:
    """The reference in float32, whatever the dtype: a plain PyTorch loop over tokens."""
    call = reference(config, torch.float32)
    # Gradients come back in the dtype of the inputs.
    limit = max(LIMITS[config.dtype], LIMITS["fp32"])
    return Contender(name=LOOP, call=call, config=config, limit=limit)


def reference(config: OpConfig, dtype: torch.dtype) -> Call:
    """The formula of an operator, computed in `dtype`."""
    spec, formula = get_spec(config.op), REFERENCES[config.op]
    options = spec.reference_options(config)

    def call(tensors: Tensors) -> Sequence[torch.Tensor]:
        return _compared(spec, formula(**tensors, **options, compute_dtype=dtype))

    return call


def _compared(spec: OpSpec, results: Any) -> Sequence[torch.Tensor]:
    """Of the results of an operator those that are compared: of a recurrence y alone."""
    if isinstance(results, torch.Tensor):
        return (results,)
    return results[:1] if spec.is_recurrence else [x for x in results if x is not None]


def peers(config: OpConfig) -> Iterator[Contender | Absentee]:
    """The known peers of an operator, those that are not installed included."""
    for peer in _PEERS:
        if peer.op != config.op:
            continue
        if peer.needs_gpu and not is_cuda(config.arch):
            yield Absentee(name=peer.name, status="missing", why="runs on a GPU only")
            continue
        try:
            y_of = peer.make(importlib.import_module(peer.module))
        except ImportError as error:
            yield Absentee(name=peer.name, status="missing", why=str(error))
        except Exception as error:  # noqa: BLE001 - what others do on import is theirs
            yield Absentee(name=peer.name, status="failed", why=first_line(error))
        else:
            yield _as_peer(peer.name, y_of, config, peer.decay)


def peer_of_file(path: Path, config: OpConfig) -> Contender | Absentee | None:
    """The peer that a Python file defines; None if it is one of another operator.

    The file has `call(...) -> y`, which takes the operator's tensors in order (r, w, k, v, a, b
    for wkv7), each [B, T, H, N], and is differentiable; and `decay`, what w means to it. `op` says
    which operator it is of, "wkv7" where there is none. It is a program, and is run.
    """
    name = path.stem
    try:
        module = _run_file(path)
        if getattr(module, "op", "wkv7") != config.op:
            return None
        function = module.call
        return _as_peer(name, lambda tensors: function(*tensors.values()), config, module.decay)
    except Exception as error:  # noqa: BLE001 - what a user's program does is theirs
        return Absentee(name=name, status="failed", why=first_line(error))


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _as_peer(
    name: str, y_of: Callable[[Tensors], torch.Tensor], config: OpConfig, decay: str
) -> Contender:
    """A contender on the same inputs, with the decay written as it wants. Raises ConfigError."""
    theirs = replace(config, decay=decay)
    return Contender(
        name=name,
        call=lambda tensors: (y_of(tensors),),
        config=theirs,
        limit=LIMITS[config.dtype],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """A known peer. make: what computes its y, from its module."""

    name: str
    op: str
    module: str
    decay: str
    needs_gpu: bool
    make: Callable[[ModuleType], Callable[[Tensors], torch.Tensor]]


def _flash_linear_attention(module: ModuleType) -> Callable[[Tensors], torch.Tensor]:
    return lambda tensors: module.chunk_rwkv7(**tensors, scale=1.0)[0]


def _rwkv7_hf(module: ModuleType) -> Callable[[Tensors], torch.Tensor]:
    """It takes the factor itself, in float32, and wants a state."""

    def call(tensors: Tensors) -> torch.Tensor:
        batch, _, heads, size = tensors["k"].shape
        y: torch.Tensor
        y, _ = module.rwkv7_recurrent(
            tensors["r"],
            torch.exp(-torch.exp(tensors["w"].float())),
            *(tensors[name] for name in ("k", "v", "a", "b")),
            tensors["k"].new_zeros(batch, heads, size, size, dtype=torch.float32),
        )
        return y

    return call


_PEERS = (
    _Peer(
        name="fla",
        op="wkv7",
        module="fla.ops.rwkv7",
        decay="log",
        needs_gpu=True,
        make=_flash_linear_attention,
    ),
    _Peer(
        name="rwkv7-hf",
        op="wkv7",
        module="rwkv7_hf.ops_rwkv7",
        decay="loglog",
        needs_gpu=False,
        make=_rwkv7_hf,
    ),
)


@functools.cache
def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rwkv_jit_bench_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
