"""Programs that build RWKV kernels of their own, run on ours with no changed line.

`torch.utils.cpp_extension.load` is replaced by name: what an RWKV program would build, and only
that, is registered in torch.ops with our operators behind it, for any head size, on any device.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils import cpp_extension

from ..errors import ConfigError, RwkvJitError
from ..settings import current_settings
from .calls import call
from .extensions import EXTENSIONS, Function
from .step_calls import call_step

# The `rwkv` package's own: RWKV-4 and matrix products, which are no operators of ours. TorchScript
# looks them up even where none is called, as on a CPU; on a GPU upstream's are built.
_UNSERVED = "wkv_cuda"
_UNSERVED_SCHEMAS = """
wkv_forward(int B, int T, int C, Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) y, \
Tensor(b!) aa, Tensor(c!) bb, Tensor(d!) pp) -> ()
mm8_seq(int B, int N, int M, Tensor x, Tensor w, Tensor mx, Tensor rx, Tensor my, Tensor ry, \
Tensor(a!) y) -> ()
mm8_one(int N, int M, Tensor x, Tensor w, Tensor mx, Tensor rx, Tensor my, Tensor ry, \
Tensor(a!) y) -> ()
gemm_fp16_cublas(Tensor a, Tensor b, Tensor(a!) c) -> ()
"""


class Interception:
    """What `intercept` has done; leaving it as a context, or `undo`, takes it back."""

    def __init__(self, loader: _Loader) -> None:
        self._loader: _Loader | None = loader

    def undo(self) -> None:
        """Put the original `load` back, unless another `intercept` is still in force. What was
        registered in torch.ops stays, as models may hold it."""
        loader, self._loader = self._loader, None
        if loader is not None:
            loader.release()

    def __enter__(self) -> Interception:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def intercept() -> Interception:
    """From now on `torch.utils.cpp_extension.load` gives our operators for the extensions of
    RWKV-LM, RWKV-CUDA, RWKV-PEFT and the `rwkv` package, by name: those of `EXTENSIONS`. Other
    names go to the original.

    Call it before the program imports `load`, or run the program by `rwkv-jit run`. What is
    replaced is said on standard error, once.

    Kernels write into the program's tensors; those of the steps around the recurrence into new
    ones, which are returned. A forward that is given a buffer for upstream's own backward leaves
    there what ours reads, if it has room, else the initial state if the backward is not given it;
    without room a backward computes the forward again. Gradients of w and u that upstream keeps for
    each sequence of the batch are summed in the first row, and zero in the others.

    Returns what undoes it, which is a context manager too.
    """
    loader = cpp_extension.load
    if not isinstance(loader, _Loader):
        loader = cpp_extension.load = _Loader(loader)
    loader.holders += 1
    return Interception(loader)


class _Loader:
    """Stands for `load` while interceptions are in force.

    holders: how many.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self.holders = 0

    # Whatever upstream passes goes on to the original.
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in EXTENSIONS:
            return registered(name)
        if name == _UNSERVED and not torch.cuda.is_available():
            return _register_unserved()
        return self._original(name, *args, **kwargs)

    def release(self) -> None:
        self.holders -= 1
        if self.holders == 0 and cpp_extension.load is self:
            cpp_extension.load = self._original


@functools.cache
def registered(name: str) -> types.ModuleType:
    """Register the functions of the extension `name` in torch.ops, once in a process.

    Returns a module that has them too, as those have that upstream builds by pybind11.
    """
    extension = EXTENSIONS[name]
    library = _library(name)
    module = types.ModuleType(name, f"{name} on rwkv_jit's {extension.op}")
    for function_name in extension.functions:
        _define(library, Function(extension, function_name))
        packet = getattr(getattr(torch.ops, name), function_name)
        setattr(module, function_name, packet)
    # Its functions are registered as long as it lives.
    module.__dict__["_library"] = library
    _announce(name, f"torch.ops.{name} is {extension.op} of rwkv_jit")
    return module


def _library(namespace: str) -> torch.library.Library:
    if any(schema.name.startswith(f"{namespace}::") for schema in torch._C._jit_get_all_schemas()):
        raise ConfigError(
            f"torch.ops.{namespace} is registered already, by an extension that was built before; "
            "call rwkv_jit.compat.intercept.intercept() before the program builds its own"
        )
    return torch.library.Library(namespace, "FRAGMENT")


def _define(library: torch.library.Library, function: Function) -> None:
    library.define(function.schema)
    run = functools.partial(call_step if function.returns else call, function)
    for key in ("CPU", "CUDA"):
        library.impl(function.name, run, key)
    # What returns nothing writes into what has its shape.
    fake = run if function.returns else lambda *_: None
    torch.library.register_fake(f"{function.extension.name}::{function.name}", fake, lib=library)


@functools.cache
def _register_unserved() -> types.ModuleType:
    library = _library("rwkv")
    for schema in _UNSERVED_SCHEMAS.strip().splitlines():
        library.define(schema)
        name = schema.partition("(")[0]

        def refuse(*_: object, name: str = name) -> NoReturn:
            raise RwkvJitError(
                f"torch.ops.rwkv.{name} is not an operator of rwkv_jit, and upstream's is built "
                "where there is a GPU alone; run the model without RWKV_CUDA_ON=1"
            )

        library.impl(name, refuse, "CompositeExplicitAutograd")
    module = types.ModuleType(_UNSERVED)
    module.__dict__["_library"] = library
    _announce(_UNSERVED, "there is no GPU for it")
    return module


def _announce(name: str, instead: str) -> None:
    if current_settings().log_level in ("debug", "info"):
        sys.stderr.write(f"rwkv_jit: {name} is not built: {instead}\n")
        sys.stderr.flush()
