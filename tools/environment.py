"""The checkout's own virtual environment: made once, then brought up to date only when needed.

Standard library alone, so that it runs on a bare Python. As a program it prepares the environment
with the extras named and prints the path of its Python:

    python3 tools/environment.py test lint
"""

# Annotations are quoted where needed instead of `from __future__ import annotations`, which is a
# syntax error on Python 3.6: even that one should get as far as the message about its age.
import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 10)
_COMPILERS = ("c++", "g++", "clang++")


class SetupError(Exception):
    """The environment cannot be made; the message says what to do about it."""


def prepare(extras: "Sequence[str]", root: Path = ROOT) -> Path:
    """Make or update `<root>/.venv` and return its Python.

    extras: of pyproject.toml; the extra `cuda` joins them on a machine with a GPU and no toolkit.

    Raises SetupError if Python is too old, there is no C++ compiler, or pip fails.
    """
    check_machine()
    wanted = {*extras, *(["cuda"] if needs_cuda_compiler() else [])}
    folder = root / ".venv"
    python = folder / "bin" / "python"
    with _only_one_at_a_time(root) as lock:
        if not _is_usable(folder):
            _make(folder)
        digest = _inputs_digest(root)
        installed = _read_stamp(folder, digest)
        if installed is None or not wanted <= installed:
            _install(root, python, sorted(wanted | (installed or set())), lock)
            _write_stamp(folder, digest, wanted | (installed or set()))
    return python


def check_machine() -> None:
    """Raise SetupError unless this Python and a C++ compiler will do."""
    if sys.version_info < MINIMUM_PYTHON:
        raise SetupError(
            f"Python {sys.version.split()[0]} is too old: rwkv_jit needs "
            f"{'.'.join(map(str, MINIMUM_PYTHON))} or later. Run this with a newer one, "
            f"for example: python3.12 {sys.argv[0]}"
        )
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((named,) if named else _COMPILERS)):
        looked_for = f"CXX={named}" if named else ", ".join(_COMPILERS)
        raise SetupError(
            f"no C++ compiler found (looked for {looked_for}); kernels are compiled on "
            "first use. Install one, for example: apt install g++ (Debian, Ubuntu) or "
            "dnf install gcc-c++ (Fedora)"
        )


def needs_cuda_compiler() -> bool:
    """Whether this machine has an NVIDIA GPU but no nvcc."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    has_nvcc = shutil.which("nvcc") or any(
        Path(home, "bin/nvcc").exists() for home in homes if home
    )
    return Path("/dev/nvidiactl").exists() and not has_nvcc


@contextlib.contextmanager
def _only_one_at_a_time(root: Path) -> "Iterator[int]":
    # The kernel drops a flock when its last holder dies, so a killed set-up blocks nobody. pip
    # holds the handle too, so that nobody deletes the folder under a pip that outlived its parent.
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another set-up of this checkout is running; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _unfinished(folder: Path) -> Path:
    """Exists while pip or venv writes: found without its writer, the folder is half made."""
    return folder / "rwkv_jit-setup-unfinished"


def _stamp(folder: Path) -> Path:
    return folder / "rwkv_jit-setup.json"


def _is_usable(folder: Path) -> bool:
    python = folder / "bin" / "python"
    if _unfinished(folder).exists() or not python.exists():
        return False
    return _succeeds(python, "-c", "")


def _succeeds(python: Path, *arguments: str) -> bool:
    command = [str(python), "-I", *arguments]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _make(folder: Path) -> None:
    try:
        import ensurepip  # noqa: F401, PLC0415
        import venv  # noqa: PLC0415
    except ImportError:
        raise SetupError(
            "this Python comes without venv; install it, for example: apt install python3-venv"
        ) from None
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        _say(f"{folder} is unusable or half made; making it anew")
        shutil.rmtree(folder)
    folder.mkdir()
    _unfinished(folder).touch()
    _say(f"making {folder}")
    try:
        venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    except (subprocess.CalledProcessError, OSError) as error:
        raise SetupError(f"the virtual environment cannot be made: {error}") from None
    _unfinished(folder).unlink()


def _install(root: Path, python: Path, extras: "Sequence[str]", lock: int) -> None:
    marker = _unfinished(root / ".venv")
    _stamp(root / ".venv").unlink(missing_ok=True)
    marker.touch()
    target = f"{root}[{','.join(extras)}]" if extras else str(root)
    constraints = root / "tools" / "constraints.txt"
    _say(f"installing rwkv_jit with {', '.join(extras) or 'no extras'}; torch is large, once")
    if not _succeeds(python, "-c", "import pip") and not _succeeds(python, "-m", "ensurepip"):
        raise SetupError(f"{python} has no pip; remove {root / '.venv'} and run this again")
    pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--constraint", str(constraints)]
    # Without isolation the build takes the constrained setuptools, and nothing else is fetched.
    for arguments in (["setuptools"], ["--no-build-isolation", "--editable", target]):
        # pip's own output goes to stderr: stdout is for the path that a caller reads.
        command = [*pip, *arguments]
        status = subprocess.run(command, stdout=2, pass_fds=(lock,), check=False).returncode
        if status < 0:
            raise SetupError(f"pip was killed by signal {-status}; the next run starts afresh")
        if status:
            # pip undoes a failed installation by itself, so the environment can be kept.
            marker.unlink()
            raise SetupError(
                f"pip failed (exit {status}); its messages are above. To see more: "
                f"{shlex.join(command).replace(' --quiet', '')}"
            )
    marker.unlink()


def _inputs_digest(root: Path) -> str:
    """Changes with whatever an installation depends on: the requirements and the place."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("pyproject.toml", "tools/constraints.txt"):
        digest.update(hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()


def _read_stamp(folder: Path, digest: str) -> "set[str] | None":
    """The extras installed from just these inputs; None if there is no such installation."""
    try:
        stamp = json.loads(_stamp(folder).read_text(encoding="utf-8"))
        return set(stamp["extras"]) if stamp["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_stamp(folder: Path, digest: str, extras: "set[str]") -> None:
    partial = _stamp(folder).with_suffix(".partial")
    partial.write_text(json.dumps({"digest": digest, "extras": sorted(extras)}), encoding="utf-8")
    partial.replace(_stamp(folder))


def _say(message: str) -> None:
    print(f"rwkv_jit: {message}", file=sys.stderr, flush=True)


def prepare_or_exit(extras: "Sequence[str]") -> Path:
    """`prepare` for a program: a SetupError ends it with the message."""
    try:
        return prepare(extras)
    except SetupError as error:
        sys.exit(f"rwkv_jit: {error}")


if __name__ == "__main__":
    print(prepare_or_exit(sys.argv[1:]))
