"""The set-up of the checkout's own environment: once, again after a change, afresh after a kill."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import environment
from environment import SetupError, check_machine, prepare

TOOLS = Path(environment.__file__).parent


class FakePip:
    """Stands in for making the environment and for pip: notes the installations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        self.installed: list[list[str]] = []
        self.failure: BaseException | None = None

    def make(self, folder: Path) -> None:
        assert folder == self.folder
        shutil.rmtree(folder, ignore_errors=True)
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        self.made += 1

    def install(self, _root: Path, _python: Path, extras: list[str], _lock: int) -> None:
        marker = self.folder / "rwkv_jit-setup-unfinished"
        marker.touch()
        if self.failure is not None:
            raise self.failure
        self.installed.append(extras)
        marker.unlink()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that an installation depends on."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "tools" / "constraints.txt").write_text("torch==2.13.0\n")
    return tmp_path


@pytest.fixture
def pip(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePip]:
    """A set-up that takes no time, on a machine without a GPU."""
    fake = FakePip(checkout / ".venv")
    monkeypatch.setattr(environment, "_make", fake.make)
    monkeypatch.setattr(environment, "_install", fake.install)
    monkeypatch.setattr(environment, "needs_cuda_compiler", lambda: False)
    return fake


def test_second_run_installs_nothing(checkout: Path, pip: FakePip) -> None:
    first = prepare(["test"], checkout)
    assert prepare(["test"], checkout) == first == checkout / ".venv" / "bin" / "python"
    assert (pip.made, pip.installed) == (1, [["test"]])


def test_fewer_extras_install_nothing_and_more_join_the_old_ones(
    checkout: Path, pip: FakePip
) -> None:
    prepare(["test", "lint"], checkout)
    prepare([], checkout)
    prepare(["clients"], checkout)
    assert pip.installed == [["lint", "test"], ["clients", "lint", "test"]]


@pytest.mark.parametrize("name", ["pyproject.toml", "tools/constraints.txt"])
def test_changed_requirements_are_installed(checkout: Path, pip: FakePip, name: str) -> None:
    prepare([], checkout)
    (checkout / name).write_text("# changed\n")
    prepare([], checkout)
    assert (pip.made, pip.installed) == (1, [[], []])


def test_environment_whose_python_is_gone_is_made_anew(checkout: Path, pip: FakePip) -> None:
    python = prepare([], checkout)
    python.unlink()
    python.symlink_to(checkout / "removed" / "python3")
    assert prepare([], checkout) == python
    assert (pip.made, pip.installed) == (2, [[], []])


def test_environment_of_a_killed_set_up_is_made_anew(checkout: Path, pip: FakePip) -> None:
    pip.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        prepare([], checkout)
    pip.failure = None
    prepare([], checkout)
    assert (pip.made, pip.installed) == (2, [[]])


def test_machine_with_a_gpu_and_no_toolkit_gets_the_compiler(
    checkout: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "needs_cuda_compiler", lambda: True)
    prepare(["test"], checkout)
    assert pip.installed == [["cuda", "test"]]


def test_failed_pip_keeps_the_environment_and_shows_the_command(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is no index, so that nothing can be found, and nothing is fetched.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(checkout))
    monkeypatch.setattr(environment, "needs_cuda_compiler", lambda: False)
    with pytest.raises(SetupError, match=r"pip failed \(exit 1\).* --constraint .*constraints.txt"):
        prepare([], checkout)
    assert environment._is_usable(checkout / ".venv")
    assert not (checkout / ".venv" / "rwkv_jit-setup.json").exists()


def test_missing_compiler_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no C\+\+ compiler found .*apt install g\+\+"):
        check_machine()


def test_old_python_is_refused_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "MINIMUM_PYTHON", (99, 1))
    with pytest.raises(SetupError, match=r"^Python 3\.\d+\.\d+\S* is too old: .* needs 99\.1"):
        check_machine()


@pytest.mark.parametrize("name", ["environment.py", "test.py", "quickstart.py"])
def test_programs_for_a_bare_python_import_the_standard_library_alone(name: str) -> None:
    program = f"import runpy; runpy.run_path({str(TOOLS / name)!r}, run_name='not_main')"
    # -S leaves out the installed packages, -c puts no checkout on the path.
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[0] = {str(TOOLS)!r}; {program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_waiting_set_up_goes_on_when_the_other_is_killed(checkout: Path) -> None:
    holder = (
        f"import sys, time; sys.path.insert(0, {str(TOOLS)!r}); import environment, pathlib\n"
        f"with environment._only_one_at_a_time(pathlib.Path({str(checkout)!r})):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
        with environment._only_one_at_a_time(checkout):
            pass
