"""Launching: open a built library, check what it says it is, and call it with tensors."""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .arch import cuda_arch_of_capability, display_arch, is_cuda
from .config import OpConfig
from .errors import ArgumentError, KernelLaunchError, KernelLoadError
from .render import BlockField, argument_block
from .spec import LAUNCHER_ABI, OpSpec

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}
# What *_dtype members of the argument block hold: rwkv_jit::DtypeCode in the templates.
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(TORCH_DTYPES.values())}
# Of a C struct's members, as the module struct writes them.
_FORMATS = {"pointer": "P", "int64": "q", "int32": "i", "double": "d"}
# Vector loads need this; a view that begins elsewhere is copied.
ALIGNMENT = 16
_LOG = logging.getLogger("rwkv_jit")


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a torch dtype, e.g. "bf16". Raises ArgumentError for one without."""
    for name, candidate in TORCH_DTYPES.items():
        if candidate == dtype:
            return name
    raise ArgumentError(
        f"dtype={dtype} is not supported; choose from bfloat16, float16, float32, float64"
    )


def dtype_code(dtype: torch.dtype) -> int:
    """What a *_dtype member of the argument block holds for a dtype."""
    return _DTYPE_CODES[dtype]


def current_stream(gpu: int) -> int:
    """What the stream member of the argument block holds: the current stream of a GPU by its
    index; -1 is a CPU."""
    if gpu < 0:
        return 0
    # torch.cuda.current_stream makes an object for this, which takes longer than a launch.
    stream: int = torch._C._cuda_getCurrentRawStream(gpu)
    return stream


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel of one configuration and entry.

    identity: what the library says it is.
    block: writes the launcher's argument block.
    sources: for each of its members what it holds ("pointer", "dtype", "size", "stream" or
        "threads"), and of which tensor, or which size or scalar.
    """

    identity: str
    config: OpConfig
    library: ctypes.CDLL
    block: struct.Struct
    sources: tuple[tuple[str, str], ...]

    def launch(
        self,
        tensors: Mapping[str, torch.Tensor | None],
        sizes: Mapping[str, float],
        device: torch.device,
    ) -> None:
        """Run on the current stream of `device`, where the tensors are. Sizes are those of the
        entry, its scalars among them. Allocates nothing and does not synchronise. Raises
        KernelLaunchError with the device's own words."""
        gpu = device.index if device.type == "cuda" else -1
        values: list[float] = []
        for source, name in self.sources:
            if source == "pointer":
                tensor = tensors[name]
                values.append(0 if tensor is None else tensor.data_ptr())
            elif source == "size":
                values.append(sizes[name])
            elif source == "dtype":
                tensor = tensors[name]
                values.append(0 if tensor is None else dtype_code(tensor.dtype))
            elif source == "stream":
                values.append(current_stream(gpu))
            else:
                values.append(torch.get_num_threads())
        self.call(values, gpu)

    def call(self, values: Sequence[float], gpu: int) -> None:
        """Run with these members of the argument block, the stream among them, on a GPU by its
        index; -1 is a CPU. A null pointer is 0."""
        block = self.block.pack(*values)
        if gpu < 0 or not _several_gpus() or gpu == torch.cuda.current_device():
            code = self.library.rwkv_jit_launch(block)
        else:
            with torch.cuda.device(gpu):
                code = self.library.rwkv_jit_launch(block)
        if code != 0:
            raise KernelLaunchError(self._failure(code, gpu))

    def _failure(self, code: int, gpu: int) -> str:
        message = f"{self.identity}: launch failed: {self.library.rwkv_jit_error(code).decode()}"
        if gpu >= 0:
            here = cuda_arch_of_capability(*torch.cuda.get_device_capability(gpu))
            if here != self.config.arch:
                message += (
                    f"; the kernel is for {display_arch(self.config.arch)} but cuda:{gpu} is "
                    f"{display_arch(here)}: get the operator with device='cuda:{gpu}'"
                )
        return message


def load_kernel(spec: OpSpec, config: OpConfig, entry: str, library: Path) -> Kernel:
    """Open `library`. Raises KernelLoadError unless it is that entry of that configuration."""
    identity = f"{config.slug}.{entry}"
    fields = argument_block(spec.entries[entry], spec.variant(config, entry))
    try:
        loaded = ctypes.CDLL(os.fspath(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise KernelLoadError(f"{identity}: {library} cannot be loaded: {error}") from error
    loaded.rwkv_jit_identity.restype = ctypes.c_char_p
    loaded.rwkv_jit_error.restype = ctypes.c_char_p
    loaded.rwkv_jit_error.argtypes = [ctypes.c_int]
    said, abi = loaded.rwkv_jit_identity().decode(), loaded.rwkv_jit_abi()
    if (said, abi) != (identity, LAUNCHER_ABI):
        # Or what is built in its place would be taken for this one, whose path it has.
        _ctypes.dlclose(loaded._handle)
        raise KernelLoadError(
            f"{identity}: {library} says it is {said} with launcher ABI {abi}, "
            f"but {identity} with ABI {LAUNCHER_ABI} was expected"
        )
    # A bytes object goes as the address of what it holds.
    loaded.rwkv_jit_launch.argtypes = [ctypes.c_char_p]
    block = struct.Struct("@" + "".join(_FORMATS[field.kind] for field in fields))
    return Kernel(identity, config, loaded, block, tuple(map(_source, fields)))


def _source(field: BlockField) -> tuple[str, str]:
    if field.kind == "int32":
        return "dtype", field.name.removesuffix("_dtype")
    if field.name in ("stream", "threads"):
        return field.name, field.name
    return ("pointer" if field.kind == "pointer" else "size"), field.name


def launchable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`tensor`, or a copy of it where it is not contiguous or not aligned for vector loads."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@functools.cache
def announce_reference(name: str) -> None:
    """Say, once in a process, that an operator runs no kernel."""
    _LOG.warning("%s: RWKV_JIT_MODE=reference: running the PyTorch recurrence, not a kernel", name)


def on_device_of(config: OpConfig, tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies on the kind of device that `config` is for."""
    return tensor.device.type == ("cuda" if is_cuda(config.arch) else "cpu")
