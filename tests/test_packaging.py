"""What an installation holds: the templates byte for byte, every module, and a quiet import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "rwkv_jit", "templates")
Contents = dict[str, bytes]


def contents(folder: Path, pattern: str = "*") -> Contents:
    """The files below a folder by relative name, without what running leaves behind."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and "__pycache__" not in path.parts
    }


def below(names: Contents, prefix: str) -> Contents:
    """The part under a prefix, with the prefix taken off."""
    return {name[len(prefix) :]: data for name, data in names.items() if name.startswith(prefix)}


def run(*command: str | Path, environment: dict[str, str] | None = None, cwd: Path) -> str:
    """Run a command outside the checkout; return what it prints, or fail with it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that no build litters the checkout itself."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Contents:
    """The source distribution's files, without the name of its top folder."""
    build = (sys.executable, "-m", "build", "--no-isolation", "--sdist", ".")
    run(*build, cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {
            member.name.partition("/")[2]: data.read()
            for member in tar
            if (data := tar.extractfile(member)) is not None
        }


@pytest.fixture(scope="module")
def wheel_file(checkout: Path) -> Path:
    """The built wheel."""
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", ".", cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> Contents:
    """The wheel's files."""
    with zipfile.ZipFile(wheel_file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_templates_byte_for_byte(wheel: Contents) -> None:
    assert below(wheel, "rwkv_jit/templates/") == contents(ROOT / "templates")


def test_sdist_holds_the_templates_byte_for_byte(sdist: Contents) -> None:
    assert below(sdist, "templates/") == contents(ROOT / "templates")


def test_wheel_holds_every_module_and_the_type_marker(wheel: Contents) -> None:
    packaged = {
        name: data
        for name, data in below(wheel, "rwkv_jit/").items()
        if not name.startswith("templates/")
    }
    assert packaged == contents(ROOT / "rwkv_jit")
    assert "py.typed" in packaged


def test_sdist_holds_every_module(sdist: Contents) -> None:
    assert below(sdist, "rwkv_jit/") == contents(ROOT / "rwkv_jit")


def test_wheel_names_its_program_and_its_licence(wheel: Contents) -> None:
    (entry_points,) = (wheel[name] for name in wheel if name.endswith("/entry_points.txt"))
    assert b"rwkv-jit = rwkv_jit.cli:main" in entry_points
    (licence,) = (wheel[name] for name in wheel if name.endswith("/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_installed_wheel_finds_its_own_templates(wheel_file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(tmp_path / "site")
    found = template_dir(tmp_path, {"PYTHONPATH": str(tmp_path / "site")})
    assert found == tmp_path / "site" / "rwkv_jit" / "templates"


def test_editable_install_uses_the_templates_of_the_checkout(
    checkout: Path, tmp_path: Path
) -> None:
    target = tmp_path / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--disable-pip-version-check", "--root-user-action=ignore", "--no-build-isolation"),
        *("--target", target, "--editable", checkout),
        cwd=tmp_path,
    )
    # A .pth file counts only in a site directory; addsitedir makes the target one.
    found = template_dir(tmp_path, {}, before=f"import site; site.addsitedir({str(target)!r})")
    assert found == checkout / "templates"
    assert contents(found) == contents(ROOT / "templates")
    assert not list(target.rglob("templates"))
    changed = found / "added_later.h"
    changed.write_text("// seen without a new installation\n")
    assert changed.name in contents(found)
    changed.unlink()


def test_version_is_the_same_everywhere(wheel_file: Path) -> None:
    import rwkv_jit

    assert wheel_file.name.startswith(f"rwkv_jit-{rwkv_jit.__version__}-")


def test_import_loads_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "import sys, rwkv_jit; "
        "print(sorted({'torch', 'numpy', 'jinja2', 'filelock', 'typer'} & set(sys.modules)))"
    )
    environment = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "RWKV_JIT_CACHE_DIR": str(home / "kernels"),
        "TMPDIR": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert run(sys.executable, "-c", program, environment=environment, cwd=home) == "[]\n"
    assert list(home.rglob("*")) == []


def template_dir(cwd: Path, environment: dict[str, str], before: str = "pass") -> Path:
    """The templates of the rwkv_jit that a fresh Python finds, without the checkout under test."""
    # -S leaves out this environment's own editable install; its packages come in by hand.
    packages = sysconfig.get_path("purelib")
    program = (
        f"import sys; {before}; sys.path.append({packages!r}); "
        "from rwkv_jit.render import template_dir; print(template_dir())"
    )
    arguments = (sys.executable, "-S", "-c", program)
    return Path(run(*arguments, environment={"PYTHONPATH": "", **environment}, cwd=cwd).strip())
