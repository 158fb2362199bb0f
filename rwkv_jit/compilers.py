"""Compilers: where they are, and what they say of themselves.

Nothing here imports torch: finding the compilers is part of every start, also of one that only
looks a kernel up.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from .errors import ToolchainError
from .settings import Settings

_HOST_COMPILERS = ("c++", "g++", "clang++")
_DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
_COMPILER_SECONDS = 60
# Says which version of the driver is loaded.
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_WAYS_OUT = (
    "use kernels built elsewhere: a bundle (`rwkv-jit bundle build`, RWKV_JIT_BUNDLE_PATH) or a "
    "cache (`rwkv-jit warm`, RWKV_JIT_CACHE_DIR), "
    "or run the PyTorch recurrence (RWKV_JIT_MODE=reference)"
)


def find_host_compiler(settings: Settings) -> Path:
    """The C++ compiler that is named, else the first on PATH. Raises ToolchainError."""
    if settings.cxx is not None:
        found = shutil.which(settings.cxx)
        if found is None:
            raise ToolchainError(
                f"CXX={settings.cxx!r} is not a program; set it to the name or path of a C++ "
                "compiler, without options, or unset it"
            )
        return Path(found)
    for name in _HOST_COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ToolchainError(
        f"no C++ compiler was found ({', '.join(_HOST_COMPILERS)} on PATH). Install one "
        f"(such as g++), or name one in CXX, or {_WAYS_OUT}"
    )


def find_cuda_home(settings: Settings) -> Path:
    """The first toolkit whose CUDA major is torch's; any, where torch is a CPU build. Raises
    ToolchainError."""
    if settings.cuda_home is not None:
        if not is_toolkit(settings.cuda_home):
            raise ToolchainError(
                f"CUDA_HOME={settings.cuda_home} is not a CUDA toolkit: it lacks bin/nvcc or "
                "include/cuda_runtime.h; set it to the toolkit's root, or unset it"
            )
        candidates = [settings.cuda_home]
    else:
        candidates = [*_homes_on_path(), _DEFAULT_CUDA_HOME, *_pip_homes()]
    wanted = torch_cuda_major()
    misfits = []
    for root in filter(is_toolkit, candidates):
        release = nvcc_release(root / "bin" / "nvcc")
        if wanted is None or wanted == cuda_major(release):
            return root
        misfits.append(f"{root / 'bin' / 'nvcc'} is of CUDA {release}")
    if misfits:
        raise ToolchainError(
            f"{misfits[0]}, but torch was built with CUDA {torch_cuda_version()}: the major "
            f"versions must be equal. Set CUDA_HOME to a toolkit of CUDA {wanted}, or "
            f"pip install 'rwkv_jit[cuda]', or {_WAYS_OUT}"
        )
    raise ToolchainError(
        "no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda, NVIDIA's pip packages). Install one "
        f"(pip install 'rwkv_jit[cuda]', or a CUDA toolkit), or {_WAYS_OUT}"
    )


@functools.cache
def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built with, such as "13.0"; None if torch is a
    CPU build or is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return match[1] if match else None


def torch_cuda_major() -> int | None:
    """The CUDA major version that torch was built with; None if torch is a CPU build."""
    version = torch_cuda_version()
    return cuda_major(version) if version else None


def is_toolkit(root: Path) -> bool:
    """Whether a folder is the root of a CUDA toolkit that can build."""
    if not (root / "bin" / "nvcc").is_file():
        return False
    # conda keeps the headers of each target apart.
    includes = (root / "include", *root.glob("targets/*/include"))
    return any((folder / "cuda_runtime.h").is_file() for folder in includes)


def host_identity(compiler: Path) -> str:
    """Name, version and target of a C++ compiler."""
    first = _ask(compiler, "--version").partition("\n")[0].strip()
    # gcc begins with the name it was called by, which is no part of what it is.
    if first.startswith(f"{compiler.name} "):
        first = "gcc" + first.removeprefix(compiler.name)
    return f"{first} {_ask(compiler, '-dumpmachine').strip()}"


def nvcc_identity(nvcc: Path) -> str:
    """Name and version of an nvcc."""
    lines = [line.strip() for line in _ask(nvcc, "--version").splitlines()]
    kept = [line for line in lines if line.startswith(("Cuda compilation tools", "Build "))]
    return f"nvcc {'; '.join(kept)}"


def nvcc_release(nvcc: Path) -> str:
    """The CUDA release that an nvcc is of, such as "13.0"."""
    report = _ask(nvcc, "--version")
    match = re.search(r"release (\d+\.\d+)", report)
    if match is None:
        raise ToolchainError(
            f"{nvcc} does not say which CUDA release it is; its --version says {report[:200]!r}"
        )
    return match[1]


def cuda_major(release: str) -> int:
    """The major version of a CUDA release."""
    return int(release.partition(".")[0])


def _homes_on_path() -> list[Path]:
    """Toolkit roots that an nvcc on PATH suggests: the folder above it, its link's target, or,
    where it is a wrapper script, what it says when asked to show its steps."""
    found = shutil.which("nvcc")
    if found is None:
        return []
    nvcc = Path(found)
    roots = [nvcc.parent.parent, nvcc.resolve().parent.parent]
    if any(is_toolkit(root) for root in roots):
        return roots
    # A dry run of nvcc prints TOP, the toolkit that it will use.
    steps = _ask(nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null")
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    return [*roots, Path(top[1].strip()).resolve()] if top else roots


def _pip_homes() -> list[Path]:
    """Toolkit roots in NVIDIA's pip packages; only those of torch's CUDA major, if it has one."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None or spec.submodule_search_locations is None:
        return []
    major = torch_cuda_major()
    folders = [Path(location) for location in spec.submodule_search_locations]
    roots = [root for folder in folders for root in folder.glob(f"cu{major or '[0-9]*'}")]
    return sorted(roots, key=lambda root: root.name, reverse=True)


def _ask(program: Path, *arguments: str) -> str:
    """What a compiler answers, once per process unless the program changes."""
    try:
        status = program.stat()
    except OSError as error:
        raise ToolchainError(f"{program} cannot be used: {error.strerror}") from error
    return _answer(program, arguments, status.st_mtime_ns, status.st_size)


@functools.cache
def _answer(program: Path, arguments: tuple[str, ...], _mtime: int, _size: int) -> str:
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_COMPILER_SECONDS,
            check=False,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{program} cannot be run: {error}") from error
    if done.returncode != 0:
        raise ToolchainError(
            f"{program} {' '.join(arguments)} failed (exit {done.returncode}): "
            f"{done.stdout.strip()[:300]}"
        )
    return done.stdout
