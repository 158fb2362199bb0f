"""CUDA kernels on a CPU, one thread of theirs after another, for tests where there is no GPU.

A rendered CUDA source becomes C++: its launches and its PTX instructions are turned into calls, and
the headers in tests/emulator stand for CUDA's. `emulate_gpu` makes the device "cuda" of the tests
mean that. What it does not show is time, and what the hardware's own rounding does: products on
tensor cores are rounded once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rwkv_jit import arguments, op, registry, serving
from rwkv_jit.arch import is_cuda
from rwkv_jit.config import OpConfig
from rwkv_jit.launch import Kernel, load_kernel
from rwkv_jit.loader import KernelTable, LoadedKernel
from rwkv_jit.ops import get_spec
from rwkv_jit.render import render

HERE = Path(__file__).parent / "emulator"
ARCH = "sm90a"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w", "-fvisibility=hidden", f"-I{HERE}")
# More than any address.
_EVERYTHING = 1 << 62
_LAUNCH = re.compile(r"([\w:]+(?:<[^;<>]*>)?)\s*<<<(.+?)>>>\(", re.DOTALL)
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
_ASM = re.compile(r"\basm(?: volatile)?\(")
_DECLARATION = re.compile(r"[{}]|\.reg [^;]*;")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def translate(source: str) -> str:
    """C++ that does, with the emulator's headers, what a rendered CUDA source says."""
    source = _SHARED.sub(r"\1* const \2 = static_cast<\1*>(emulator::shared_memory());", source)
    return _with_calls(_with_calls(source, _LAUNCH, _launch), _ASM, _instruction)


def _with_calls(text: str, opening: re.Pattern[str], made: Callable[..., str]) -> str:
    """`text` with each thing that `opening` opens, to its closing parenthesis, made anew."""
    parts, at = [], 0
    while (found := opening.search(text, at)) is not None:
        end = next(place for place, depth in _depths(text, found.end()) if depth < 0)
        parts += [text[at : found.start()], made(text[found.end() : end], *found.groups())]
        at = end + 1
    return "".join([*parts, text[at:]])


def _depths(text: str, at: int = 0) -> Iterator[tuple[int, int]]:
    """Each place outside of quotes, and in how many parentheses it is."""
    depth, quoted = 0, False
    for place in range(at, len(text)):
        if text[place] == '"':
            quoted = not quoted
        elif not quoted:
            depth += {"(": 1, ")": -1}.get(text[place], 0)
            yield place, depth


def _launch(arguments: str, kernel: str, shape: str) -> str:
    return f"emulator::Launch{{{shape}}}([=] {{ {kernel}({arguments}); }})"


def _instruction(statement: str) -> str:
    """The call that stands for an instruction: its results first, then what it reads."""
    colons = [at for at, depth in _depths(statement) if depth == 0 and statement[at] == ":"]
    sections = [
        statement[begin + 1 : end]
        for begin, end in zip([-1, *colons], [*colons, len(statement)], strict=True)
    ]
    text = _DECLARATION.sub("", "".join(_STRING.findall(sections[0])))
    instruction = text.split()[0].rstrip(";")
    operands = [
        piece.strip().rstrip(",").strip()[1:-1]
        for section in sections[1:3]
        for piece in _STRING.split(section)[2::2]
    ]
    return f"ptx::{re.sub(r'[.:]+', '_', instruction)}({', '.join(operands)})"


def build(source: str, folder: Path, *, checked: bool) -> Path:
    """The library of a CUDA source, built once below `folder`."""
    watched = ("-g", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
    emulator = (HERE / "emulator.cpp").read_text()
    defines = ("-O2", *(("-DCHECKED",) if checked else ()))
    parts = [
        _made(folder, emulator, ".o", (*_FLAGS, *defines)),
        _made(folder, translate(source), ".o", (*_FLAGS, *(watched if checked else ()))),
    ]
    return _made(folder, "", ".so", ("-shared", *map(str, parts)))


def _made(folder: Path, text: str, suffix: str, flags: Sequence[str]) -> Path:
    """What g++ makes of a source, or of none, once for all processes."""
    headers = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    digest = hashlib.sha256(repr((flags, headers, text)).encode()).hexdigest()[:16]
    made = folder / f"{digest}{suffix}"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            source, output = Path(name, "source.cpp"), Path(name, "output")
            source.write_text(text)
            inputs = ["-c", source] if suffix == ".o" else []
            command = ["g++", *flags, *inputs, "-o", output]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr[-4000:]
            output.replace(made)
    return made


class EmulatedKernel(Kernel):
    """A kernel whose threads are fibers. Seeded: the order of warps is another at each launch."""

    __slots__ = ()

    def launch(
        self,
        tensors: Mapping[str, torch.Tensor | None],
        sizes: Mapping[str, float],
        device: torch.device,
    ) -> None:
        """As a kernel does; it may touch these tensors alone, and not write to inputs."""
        entry = get_spec(self.config.op).entries[self.identity.rpartition(".")[2]]
        inputs = {tensor.name for tensor in entry.inputs}
        self._begin()
        for name, tensor in tensors.items():
            if tensor is not None:
                self._allow(tensor.data_ptr(), tensor.nbytes, name not in inputs)
        super().launch(tensors, sizes, device)

    def call(self, block: bytes, gpu: int) -> None:
        """As a kernel does; where it was not launched with tensors, it may touch everything."""
        if not self.library.emulator_allowed():
            self._begin()
            self._allow(0, _EVERYTHING, True)
        try:
            super().call(block, gpu)
        finally:
            self.library.emulator_end()

    def _begin(self) -> None:
        self.library.emulator_begin(random.getrandbits(31))

    def _allow(self, address: int, size: int, writable: bool) -> None:
        self.library.emulator_allow(ctypes.c_void_p(address), ctypes.c_size_t(size), int(writable))


class _OnCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        placed = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **placed)


def _on_cpu(value: Any) -> Any:
    is_gpu = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return torch.device("cpu") if is_gpu else value


def emulate_gpu(folder: Path, *, checked: bool) -> None:
    """From now on, in this process, "cuda" is an emulated GPU. folder: of built kernels. checked:
    whether what its threads read and write is checked, which takes several times as long."""
    load = KernelTable._load

    def load_emulated(self: KernelTable, slug: str, entry: str) -> LoadedKernel:
        config = OpConfig.parse(slug)
        if not is_cuda(config.arch):
            return load(self, slug, entry)
        spec = get_spec(config.op)
        library = build(render(spec, config, entry).text, folder, checked=checked)
        made = load_kernel(spec, config, entry, library)
        kernel = EmulatedKernel(*(getattr(made, f.name) for f in dataclasses.fields(made)))
        with self._lock:
            return self._loaded.setdefault((slug, entry), LoadedKernel(kernel, None))

    KernelTable._load = load_emulated
    host_arch = registry._device_arch

    def device_arch(device: Any, current_gpu: int | None) -> str:
        return ARCH if str(device).startswith("cuda") else host_arch(device, current_gpu)

    registry._device_arch = device_arch
    torch.cuda.is_current_stream_capturing = lambda: False
    arguments.on_device_of = lambda _config, _tensor: True
    op.is_cuda = serving.is_cuda = lambda _arch: False
    _OnCpu().__enter__()
