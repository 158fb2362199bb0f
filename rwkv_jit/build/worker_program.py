"""The program of the process that builds one kernel: `python -I worker_program.py REQUEST.json`.

It stands alone: it imports torch, whose cpp_extension does the building, and nothing of rwkv_jit.
Compilers and this program write to standard output, which is the build's log.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

# What would change a build behind the cache key's back, or send it elsewhere.
_IGNORED_VARIABLES = (
    "CC",
    "CUDA_INC_PATH",
    "CUDA_PATH",
    "CUDNN_HOME",
    "CUDNN_PATH",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "PYTORCH_NVCC",
    "TORCH_CUDA_ARCH_LIST",
    "TORCH_EXTENSIONS_DIR",
)
# cpp_extension links against these; a kernel must not need them, so empty linker scripts stand in.
_TORCH_LIBRARIES = (
    "c10",
    "c10_cuda",
    "torch",
    "torch_cpu",
    "torch_cuda",
    "torch_python",
)
# The same name for the working directory wherever it lies, so that no path of a machine gets into
# a library: not as the place of its source, and not as a name of debug information.
_HERE = Path("/proc/self/cwd")
_WATCH_SECONDS = 0.5


def main(arguments: list[str]) -> int:
    """Build, load and check what a request asks for; the library is then at its `library`."""
    request: dict[str, Any] = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(request["parent"],), daemon=True).start()
    sys.path[:] = request["sys_path"]
    _prepare_environment(request)
    build = Path(request["build_directory"])
    cudart = _prepare_libraries(build / "lib", request)
    if cudart is not None:
        # What is built needs it, and a CPU build of torch has not loaded it.
        ctypes.CDLL(str(cudart), mode=ctypes.RTLD_GLOBAL)
    _build(request, build)
    built = build / f"{request['name']}.so"
    problem = _check(built, request["abi"], request["identity"])
    if problem:
        print(f"rwkv_jit worker: {problem}", flush=True)
        return 3
    shutil.move(built, request["library"])
    return 0


def _end_with(parent: int) -> None:
    """End this program and its compilers when the process that wants the library is gone."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    # ninja, which is in this group, passes it on to the compilers.
    os.killpg(0, signal.SIGTERM)


def _prepare_environment(request: dict[str, Any]) -> None:
    for name in _IGNORED_VARIABLES:
        os.environ.pop(name, None)
    try:
        import ninja  # noqa: PLC0415
    except ImportError:
        pass
    else:
        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ["CXX"] = request["host_compiler"]
    os.environ["LC_ALL"] = "C"
    os.environ["MAX_JOBS"] = "1"
    os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # A build must neither wait for a device nor take memory on it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if request["cuda_home"] is not None:
        os.environ["CUDA_HOME"] = request["cuda_home"]


def _prepare_libraries(folder: Path, request: dict[str, Any]) -> Path | None:
    """Fill the folder that the linker searches first; the CUDA runtime's library, if needed.
    pip's packages hold only its versioned name."""
    folder.mkdir()
    for name in _TORCH_LIBRARIES:
        (folder / f"lib{name}.so").write_text("/* empty */\n", encoding="utf-8")
    for place in map(Path, request["library_dirs"]):
        for library in sorted(place.glob(f"libcudart.so.{request['cuda_major']}*")):
            (folder / "libcudart.so").symlink_to(library.resolve())
            return library
    return None


def _build(request: dict[str, Any], build: Path) -> None:
    from torch.utils import cpp_extension  # noqa: PLC0415

    flags = request["code_flags"]
    source = _HERE / request["source"]
    cuda = request["cuda_home"] is not None
    if cuda:
        # A CPU build of torch leaves it None and then refuses CUDA sources.
        cpp_extension.CUDA_HOME = request["cuda_home"]
    cpp_extension.load(
        name=request["name"],
        sources=[str(source if source.is_file() else build / request["source"])],
        extra_cflags=[] if cuda else flags,
        extra_cuda_cflags=[*flags, f"-ccbin={request['host_compiler']}"] if cuda else [],
        # Relative: ninja runs in the build directory, whose path may hold blanks. Undefined
        # symbols are errors, so what links needs nothing of torch.
        extra_ldflags=[
            *("-Wl,--as-needed", "-Wl,-z,defs", "-Llib", "-pthread"),
            # nvcc names local symbols after its process id.
            *(["-s"] if cuda else []),
        ],
        build_directory=str(build),
        is_python_module=False,
        with_cuda=cuda,
        verbose=True,
    )


def _check(path: Path, abi: int, identity: str) -> str:
    """What is wrong with a library; empty if it is what was asked for."""
    try:
        library = ctypes.CDLL(str(path))
        library.rwkv_jit_identity.restype = ctypes.c_char_p
        found_abi = library.rwkv_jit_abi()
        found_identity = (library.rwkv_jit_identity() or b"").decode(errors="replace")
        _ = library.rwkv_jit_launch, library.rwkv_jit_error
    except (OSError, AttributeError) as error:
        return f"the library cannot be used: {error}"
    if found_abi != abi:
        return f"the library has launcher ABI {found_abi} instead of {abi}"
    if found_identity != identity:
        return f"the library says it is {found_identity!r} instead of {identity!r}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv))
