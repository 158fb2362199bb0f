"""Launching: open a built library, check what it says it is, and call it with tensors."""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import logging
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .arch import cuda_arch_of_capability, display_arch, is_cuda
from .config import OpConfig
from .errors import ArgumentError, KernelLaunchError, KernelLoadError
from .render import argument_block
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
_ALIGNED = bytes(range(0, 256, ALIGNMENT))
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


def stream_and_threads(gpu: int) -> tuple[int, int]:
    """The last members of the argument block: the current stream of a GPU by its index, or the
    threads of a CPU, which is -1."""
    if gpu < 0:
        return 0, torch.get_num_threads()
    # torch.cuda.current_stream makes an object for this, which takes longer than a launch.
    return torch._C._cuda_getCurrentRawStream(gpu), 0


def is_current(gpu: int) -> bool:
    """Whether kernels are launched on this GPU as things are; -1 is a CPU."""
    return gpu < 0 or not several_gpus() or gpu == torch.cuda.current_device()


@functools.cache
def several_gpus() -> bool:
    """Whether there is another GPU than the current one."""
    return torch.cuda.device_count() > 1


def are_aligned(block: bytes, pointers: int) -> bool:
    """Whether so many addresses, with which an argument block begins, are fit for vector loads."""
    # An address begins with its lowest byte. Two calls in C take less than a look at each address.
    return not block[: 8 * pointers : 8].translate(None, _ALIGNED)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel of one configuration and entry.

    identity: what the library says it is.
    launcher: of the library, which looks it up by name at every use.
    block: writes the launcher's argument block.
    pointers, dtypes, sizes: whose its members are, in this order, scalars after the sizes; stream
        and threads follow.
    """

    identity: str
    config: OpConfig
    library: ctypes.CDLL
    launcher: Callable[[bytes], int]
    block: struct.Struct
    pointers: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[str, ...]

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
        given = [tensors[name] for name in self.pointers]
        typed = [tensors[name] for name in self.dtypes]
        values = (
            *(0 if tensor is None else tensor.data_ptr() for tensor in given),
            *(0 if tensor is None else dtype_code(tensor.dtype) for tensor in typed),
            *(sizes[name] for name in self.sizes),
            *stream_and_threads(gpu),
        )
        block = self.block.pack(*values)
        if is_current(gpu):
            self.call(block, gpu)
        else:
            with torch.cuda.device(gpu):
                self.call(block, gpu)

    def call(self, block: bytes, gpu: int) -> None:
        """Run with this argument block on a GPU by its index, which has to be the current one; -1
        is a CPU. A null pointer is 0."""
        # ctypes hands over the address of what a bytes object holds.
        code = self.launcher(block)
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
    block = struct.Struct("@" + "".join(_FORMATS[field.kind] for field in fields))
    own = [field for field in fields if field.name not in ("stream", "threads")]
    return Kernel(
        identity,
        config,
        loaded,
        loaded.rwkv_jit_launch,
        block,
        pointers=tuple(field.name for field in own if field.kind == "pointer"),
        dtypes=tuple(field.name.removesuffix("_dtype") for field in own if field.kind == "int32"),
        sizes=tuple(field.name for field in own if field.kind in ("int64", "double")),
    )


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
