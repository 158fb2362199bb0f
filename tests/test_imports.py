"""The direction of imports inside rwkv_jit: a module uses what stands before it in the flow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rwkv_jit"
# Data order. A folder is one stage, or, where it names its modules here, one for each, and its
# __init__ another.
FLOW = (
    "errors",
    "settings",
    "arch",
    "config",
    "spec",
    "ops",
    "kernel_list",
    "render",
    "compilers",
    "toolchain",
    "cache.folders",
    "cache.trust",
    "cache.manifest",
    "cache.keys",
    "cache.usage",
    "cache.growth",
    "cache.locks",
    "cache.roots",
    "cache.entries",
    "cache.store",
    "cache",
    "build.report",
    "build.progress",
    "build.jobs",
    "build.worker_program",
    "build.worker",
    "build.attempt",
    "build.build",
    "build",
    "bundle.index",
    "bundle.sign",
    "bundle.read",
    "bundle.places",
    "bundle.match",
    "bundle.make",
    "bundle.archive",
    "bundle.wheel",
    "bundle",
    "launch",
    "loader",
    "usage",
    "reference",
    "indices",
    "arguments",
    "gradients",
    "autograd",
    "serving_launch",
    "serving",
    "op",
    "registry",
    "pool",
    "nn.operators",
    "nn.parameters",
    "nn.layer",
    "nn.time_mix",
    "nn.channel_mix",
    "nn.loss",
    "nn",
    "compat.tensors",
    "compat.flash_rwkv",
    "compat.rwkv_ops_calls",
    "compat.rwkv_ops",
    "compat.fla_calls",
    "compat.fla_steps",
    "compat.fla",
    "compat.fla_backend",
    "compat.channels",
    "compat.rwkv_lm",
    "compat.extensions",
    "compat.received",
    "compat.steps",
    "compat.calls",
    "compat.step_calls",
    "compat.intercept",
    "compat",
    "bench.cases",
    "bench.inputs",
    "bench.gate",
    "bench.timing",
    "bench.contenders",
    "bench.measure",
    "bench.machine",
    "bench.plot",
    "bench",
    "cli.planning",
    "cli.warming",
    "cli.describe",
    "cli.explain",
    "cli.trial",
    "cli.toolchain_checks",
    "cli.doctor",
    "cli.output",
    "cli.tables",
    "cli.options",
    "cli.warm_command",
    "cli.commands",
    "cli.cache_commands",
    "cli.bundle_build",
    "cli.bundle_commands",
    "cli.bench_tables",
    "cli.bench_commands",
    "cli.run_command",
    "cli",
    "__main__",
)
# The package itself: it names its public objects and imports them when they are used.
ROOT_MODULES = ("__init__",)
# Programs: started as processes, imported by nobody.
PROGRAMS = ("build.worker_program",)


def stage_of(name: str, flow: tuple[str, ...]) -> str:
    """The stage of a module or of a name in it: the longest beginning that is one, else its top."""
    parts = name.split(".")
    beginnings = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((beginning for beginning in beginnings if beginning in flow), parts[0])


def stages(package: Path, flow: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of each stage. A file that a folder with named modules does not name stands for
    itself."""
    split = {stage.partition(".")[0] for stage in flow if "." in stage}
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        stage = name if name.partition(".")[0] in split else stage_of(name, flow)
        found.setdefault(stage, []).append(path)
    return found


def imported_stages(path: Path, package: Path, flow: tuple[str, ...]) -> set[str]:
    """The stages that a file imports, those for type checking or inside functions included."""
    folders = ("rwkv_jit", *path.relative_to(package).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One dot is the file's own folder, each further one a folder above.
            near = folders[: len(folders) - node.level + 1] if node.level else ()
            base = ".".join(filter(None, (*near, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        inside = [name.partition(".")[2] for name in names if name.startswith("rwkv_jit.")]
        found |= {stage_of(name, flow) for name in inside}
    return found


def upward_imports(package: Path, flow: tuple[str, ...]) -> list[str]:
    """Imports that go against the flow, as sentences."""
    return [
        f"{path.relative_to(package)} imports {other}, a later stage"
        for stage, files in stages(package, flow).items()
        if stage in flow
        for path in files
        for other in imported_stages(path, package, flow) & set(flow)
        if flow.index(other) > flow.index(stage)
    ]


def test_every_module_has_its_place_in_the_flow() -> None:
    assert set(stages(PACKAGE, FLOW)) == {*FLOW, *ROOT_MODULES}


def test_no_import_goes_against_the_flow() -> None:
    assert upward_imports(PACKAGE, FLOW) == []


def test_programs_are_imported_by_nobody() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not imported_stages(path, PACKAGE, FLOW) & set(PROGRAMS), path


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


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("first.py", "from .second import thing"),
        ("first.py", "from . import second"),
        ("first.py", "from ..folder.second import thing"),
        ("first.py", "from ..folder import second"),
        ("first.py", "import rwkv_jit.folder.second"),
        ("first.py", "from .. import folder"),
        ("first.py", "from . import thing"),
        ("../before.py", "from .folder.second import thing"),
        ("../before.py", "from .folder import thing"),
    ],
)
def test_a_folder_that_names_its_modules_has_an_order(
    tmp_path: Path, where: str, line: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("__init__", "first", "second"):
        (folder / f"{name}.py").touch()
    (folder / where).write_text(line)
    (folder / "__init__.py").write_text("from .first import thing\nfrom . import second")
    assert len(upward_imports(tmp_path, ("before", "folder.first", "folder.second", "folder"))) == 1


def test_a_folder_that_names_its_modules_names_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("__init__", "first", "second"):
        (tmp_path / "folder" / f"{name}.py").touch()
    flow = ("folder.first", "folder")
    assert set(stages(tmp_path, flow)) == {*flow, "folder.second"}


def test_imports_within_a_folder_that_is_one_stage_are_free(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "a.py").write_text("from .second import thing\nfrom . import second")
    (tmp_path / "first" / "second.py").touch()
    (tmp_path / "second.py").touch()
    assert not upward_imports(tmp_path, ("first", "second"))
