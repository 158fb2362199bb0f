"""The direction of imports inside rwkv_jit: a module uses what stands before it in the flow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rwkv_jit"
# Data order. A folder is one stage.
FLOW = (
    "errors",
    "settings",
    "arch",
    "config",
    "spec",
    "ops",
    "render",
    "toolchain",
    "report",
    "progress",
    "jobs",
    "manifest",
    "keys",
    "folders",
    "cache",
    "build_worker",
    "worker",
    "build",
    "launch",
    "loader",
    "reference",
    "arguments",
    "autograd",
    "registry",
    "warming",
    "describe",
    "trial",
    "doctor",
    "tables",
    "options",
    "cli_cache",
    "cli",
    "__main__",
)
# The package itself: it names its public objects and imports them when they are used.
ROOT_MODULES = ("__init__",)
# Programs: started as processes, imported by nobody.
PROGRAMS = ("build_worker",)


def stages(package: Path) -> dict[str, list[Path]]:
    """The files of each stage: a module or a folder of the package."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        stage = path.relative_to(package).parts[0].removesuffix(".py")
        found.setdefault(stage, []).append(path)
    return found


def imported_stages(path: Path, package: Path) -> set[str]:
    """The stages that a file imports, those for type checking or inside functions included."""
    depth = len(path.relative_to(package).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Dots beyond the file's own depth would leave the package; fewer stay in its folder.
            if node.level == 0:
                base = node.module or ""
            elif node.level == depth:
                base = ".".join(filter(None, ("rwkv_jit", node.module)))
            else:
                base = f"rwkv_jit.{path.relative_to(package).parts[0]}"
            names = [f"{base}.{alias.name}" for alias in node.names]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "rwkv_jit" and len(part) > 1}
    return found


def upward_imports(package: Path, flow: tuple[str, ...]) -> list[str]:
    """Imports that go against the flow, as sentences."""
    return [
        f"{path.relative_to(package)} imports {other}, a later stage"
        for stage, files in stages(package).items()
        if stage in flow
        for path in files
        for other in imported_stages(path, package) & set(flow)
        if flow.index(other) > flow.index(stage)
    ]


def test_every_module_has_its_place_in_the_flow() -> None:
    assert set(stages(PACKAGE)) == {*FLOW, *ROOT_MODULES}


def test_no_import_goes_against_the_flow() -> None:
    assert upward_imports(PACKAGE, FLOW) == []


def test_programs_are_imported_by_nobody() -> None:
    for files in stages(PACKAGE).values():
        for path in files:
            assert not imported_stages(path, PACKAGE) & set(PROGRAMS), path


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("first.py", "from .second import thing"),
        ("first.py", "from . import second"),
        ("first.py", "import rwkv_jit.second"),
        ("first.py", "from rwkv_jit.second import thing"),
        ("first.py", "def f():\n    from .second import thing"),
        ("first/inner.py", "from ..second import thing"),
        ("first/inner.py", "from .. import second"),
    ],
)
def test_an_upward_import_is_seen_in_every_form(tmp_path: Path, where: str, line: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    (tmp_path / "second.py").touch()
    assert upward_imports(tmp_path, ("first", "second"))
    assert not upward_imports(tmp_path, ("second", "first"))


def test_imports_within_a_folder_are_free(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "a.py").write_text("from .second import thing\nfrom . import second")
    (tmp_path / "first" / "second.py").touch()
    (tmp_path / "second.py").touch()
    assert not upward_imports(tmp_path, ("first", "second"))
