"""rwkv_jit: the RWKV operators for PyTorch, from kernels that are built once and cached.

Importing it touches no GPU, no disk and no compiler, and does not import torch.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import OpConfig as OpConfig
    from .op import ElementwiseOp as ElementwiseOp
    from .op import Op as Op
    from .pool import StatePool as StatePool
    from .registry import get_op as get_op
    from .registry import list_ops as list_ops
    from .serving import ServingOp as ServingOp
    from .usage import freeze as freeze
    from .usage import used_configs as used_configs

__version__ = "0.1.0"
__all__ = [
    "ElementwiseOp",
    "Op",
    "OpConfig",
    "ServingOp",
    "StatePool",
    "freeze",
    "get_op",
    "list_ops",
    "used_configs",
]

_HOMES = {
    "ServingOp": "serving",
    "ElementwiseOp": "op",
    "Op": "op",
    "OpConfig": "config",
    "StatePool": "pool",
    "freeze": "usage",
    "get_op": "registry",
    "list_ops": "registry",
    "used_configs": "usage",
}


def __getattr__(name: str) -> object:
    """Import the public names when they are first used."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What importing allocates stays. A collection on the way would walk over all of torch for that.
    collecting = gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(f".{home}", __name__)
    finally:
        if collecting:
            gc.enable()
    return getattr(module, name)
