"""Bundles in use: the loader takes their kernels, writes nothing and starts no compiler."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch

from bundles import fake_bundle, fake_entry, source_of, tree
from comparing import assert_matches_reference, random_call
from rwkv_jit import build, loader, toolchain
from rwkv_jit.bundle import Bundle, match
from rwkv_jit.bundle.archive import copy_bundle
from rwkv_jit.bundle.make import write_bundle
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import BundleError, KernelMissingError
from rwkv_jit.loader import KernelTable
from rwkv_jit.op import Op
from rwkv_jit.settings import Settings

ROOT = Path(__file__).parent.parent.parent
PYTHONPATH = f"{ROOT}{os.pathsep}{sysconfig.get_path('purelib')}"
NOBODY = 65534
CUDA_SLUG = "wkv7_n32_bf16_l16_sm90a"


@pytest.fixture
def settings(tmp_path: Path, cpu_bundle: Bundle) -> Settings:
    """Prebuilt kernels alone, of `cpu_bundle`, with a cache that does not exist."""
    return Settings(
        cache_dir=tmp_path / "cache",
        mode="prebuilt",
        bundle_path=(cpu_bundle.root,),
        log_level="quiet",
    )


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> KernelTable:
    """A table of this test's own."""
    monkeypatch.setattr(loader, "current_settings", lambda: settings)
    return KernelTable()


def use(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(loader, "current_settings", lambda: settings)


def forbid_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **_options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    # What compilers answered before is remembered; here they must not even be asked.
    monkeypatch.setattr(build.build, "find_toolchain", refuse)


def test_prebuilt_kernels_load_without_any_program_and_nothing_is_written(
    tmp_path: Path,
    table: KernelTable,
    cpu_bundle: Bundle,
    cpu_slug: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_programs(monkeypatch)
    before = tree(cpu_bundle.root)
    for entry in ("forward", "backward"):
        table.get(cpu_slug, entry)
        loaded = table.peek(cpu_slug, entry)
        assert loaded is not None
        assert loaded.origin.path.parent.parent == cpu_bundle.root
    assert tree(cpu_bundle.root) == before
    assert not (tmp_path / "cache").exists()


def test_a_miss_starts_no_program_writes_nothing_and_names_the_command(
    tmp_path: Path, table: KernelTable, monkeypatch: pytest.MonkeyPatch, cpu_slug: str
) -> None:
    forbid_programs(monkeypatch)
    missing = cpu_slug.replace("n8", "n16")
    with pytest.raises(KernelMissingError) as caught:
        table.get(missing, "forward")
    said = str(caught.value)
    assert "RWKV_JIT_MODE=prebuilt forbids building" in said
    assert "rwkv-jit warm wkv7 --head-size 16 --dtype fp32" in said
    assert "it has head_size=8 instead of 16" in said
    assert not (tmp_path / "cache").exists()


def test_a_miss_for_another_cuda_says_so(
    tmp_path: Path, table: KernelTable, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fake_bundle(tmp_path / "old", [CUDA_SLUG], cuda_major=12)
    use(monkeypatch, dataclasses.replace(settings, bundle_path=(bundle.root,)))
    for module in (match, build.build):
        monkeypatch.setattr(module, "torch_cuda_major", lambda: 13)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(
        KernelMissingError, match="it needs CUDA 12, but torch here was built with CUDA 13"
    ):
        table.get(CUDA_SLUG, "forward")


def test_a_miss_without_a_compiler_says_why_the_bundle_does_not_serve(
    table: KernelTable, settings: Settings, monkeypatch: pytest.MonkeyPatch, cpu_slug: str
) -> None:
    use(monkeypatch, dataclasses.replace(settings, mode="auto", cxx="no-such-compiler"))
    with pytest.raises(toolchain.ToolchainError, match="it has head_size=8 instead of 16"):
        table.get(cpu_slug.replace("n8", "n16"), "forward")


def damaged(bundle: Bundle, out: Path) -> Bundle:
    copied = copy_bundle(bundle, out, replace=False)
    for library in out.rglob("kernel.so"):
        library.write_bytes(library.read_bytes()[:-1])
    return copied


def test_a_damaged_kernel_is_an_error_where_kernels_are_prebuilt(
    tmp_path: Path,
    table: KernelTable,
    settings: Settings,
    cpu_bundle: Bundle,
    cpu_slug: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = damaged(cpu_bundle, tmp_path / "bad")
    use(monkeypatch, dataclasses.replace(settings, bundle_path=(bad.root,)))
    with pytest.raises(BundleError, match="bytes instead of"):
        table.get(cpu_slug, "forward")


def test_a_damaged_kernel_is_passed_over_for_the_cache_with_one_warning(
    tmp_path: Path,
    table: KernelTable,
    session_cache: Path,
    settings: Settings,
    cpu_bundle: Bundle,
    cpu_slug: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = damaged(cpu_bundle, tmp_path / "bad")
    auto = dataclasses.replace(
        settings, mode="auto", bundle_path=(bad.root,), cache_dir=session_cache
    )
    use(monkeypatch, auto)
    with pytest.warns(RuntimeWarning, match="passed over") as caught:
        table.get(cpu_slug, "forward")
    assert len(caught) == 1
    loaded = table.peek(cpu_slug, "forward")
    assert loaded is not None
    assert session_cache in loaded.origin.path.parents


def test_a_library_that_does_not_load_here_is_passed_over(
    tmp_path: Path,
    table: KernelTable,
    session_cache: Path,
    settings: Settings,
    cpu_slug: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = fake_entry(tmp_path / "entries", cpu_slug, library=b"for a newer C library")
    bundle = write_bundle([entry], tmp_path / "bundle")
    auto = dataclasses.replace(
        settings, mode="auto", bundle_path=(bundle.root,), cache_dir=session_cache
    )
    use(monkeypatch, auto)
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        table.get(cpu_slug, "forward")


@pytest.mark.parametrize("change", [{"policy": "always"}, {"mode": "rebuild"}])
def test_what_must_be_built_anew_is_not_taken_from_a_bundle(
    table: KernelTable,
    settings: Settings,
    cpu_slug: str,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
) -> None:
    use(monkeypatch, dataclasses.replace(settings, mode=change.get("mode", "auto")))
    table.set_policy(cpu_slug, change.get("policy", "auto"))

    def obtain(*_arguments: object, **_options: object) -> None:
        raise KernelMissingError("the cache was asked")

    monkeypatch.setattr(loader, "obtain", obtain)
    with pytest.raises(KernelMissingError, match="the cache was asked"):
        table.get(cpu_slug, "forward")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="levels are those of x86-64")
def test_a_kernel_for_a_lower_level_runs_and_says_what_it_is(
    tmp_path: Path,
    table: KernelTable,
    session_cache: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, high = (f"wkv7_n8_fp32_l16_x86_64_{level}" for level in ("v2", "v3"))
    ours = Settings(cache_dir=session_cache, log_level="quiet")
    entries = [build.obtain(source_of(f"{low}.{name}"), ours) for name in ("forward", "backward")]
    bundle = write_bundle(entries, tmp_path / "bundle")
    use(monkeypatch, dataclasses.replace(settings, bundle_path=(bundle.root,)))
    monkeypatch.setattr("rwkv_jit.autograd.KERNELS", table)
    op = Op(OpConfig.parse(high))
    assert_matches_reference(op, random_call(2, 35, 2, 8), "cpu")
    loaded = table.peek(high, "backward")
    assert loaded is not None
    assert loaded.kernel.identity == f"{low}.backward"


def test_frozen_a_build_is_an_error_that_names_the_command(
    table: KernelTable, settings: Settings, cpu_slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, dataclasses.replace(settings, mode="auto"))
    table.freeze("error")
    table.get(cpu_slug, "forward")
    with pytest.raises(KernelMissingError, match=r"(?s)rwkv-jit warm.*freeze\('error'\)"):
        table.get(cpu_slug.replace("n8", "n240"), "forward")


def test_frozen_with_a_warning_it_is_built(
    table: KernelTable,
    settings: Settings,
    session_cache: Path,
    cpu_slug: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def obtain(source: object, _settings: Settings, *, policy: str) -> object:
        asked.append(policy)
        if policy == "never":
            raise KernelMissingError("not there")
        return real(source, Settings(cache_dir=session_cache, log_level="quiet"))

    real = build.obtain
    monkeypatch.setattr(loader, "obtain", obtain)
    use(monkeypatch, dataclasses.replace(settings, mode="auto", bundle_path=()))
    table.freeze("warn")
    with pytest.warns(RuntimeWarning, match=r"built after rwkv_jit\.freeze\('warn'\)"):
        table.get(cpu_slug, "forward")
    assert asked == ["never", "auto"]
    table.freeze("off")
    table.get(cpu_slug, "backward")
    assert asked[2:] == ["auto"]


PROGRAM = textwrap.dedent(
    """
    import os, shutil, sys
    import torch
    from rwkv_jit import freeze, get_op, used_configs
    from rwkv_jit.reference import REFERENCES
    device, size, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
    for program in ("g++", "c++", "cc", "nvcc", "ninja"):
        assert shutil.which(program) is None, program
    freeze("error")
    op = get_op("wkv7", head_size=size, dtype=dtype, device=device)
    torch.manual_seed(0)
    shape = (1, 19, 2, size)
    kk = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    given = [torch.randn(shape) for _ in range(4)] + [-kk, kk * torch.rand(shape)]
    ours = [x.to(device, dtype).requires_grad_() for x in given]
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]
    for run, inputs in ((op, ours), (REFERENCES["wkv7"], exact)):
        y, _ = run(*inputs)
        y.double().square().sum().backward()
        results = [y.detach(), *(x.grad for x in inputs)]
        results = [x.double().cpu() for x in results]
        if run is op:
            mine = results
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, results))
    origin = op.info()["kernels"]["backward"]["library"]
    print(os.getuid(), worst, origin, *used_configs())
    """
)


def python_for(user: int | None) -> str:
    """A Python of this version that a user can run with torch; empty if there is none."""
    if user is None:
        return sys.executable
    version = "python{}.{}".format(*sys.version_info)
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [candidate, "-c", "import torch, jinja2"],
                user=user,
                group=user,
                extra_groups=[],
                env={"PYTHONPATH": PYTHONPATH},
                cwd="/",
                capture_output=True,
                check=False,
            )
            if done.returncode == 0:
                return candidate
    return ""


def stripped(
    folder: Path,
    bundle: Path,
    *arguments: str,
    python: str = sys.executable,
    user: int | None = None,
    **variables: str,
) -> list[str]:
    """What PROGRAM prints where there are prebuilt kernels and hardly anything else."""
    home, empty = folder / "home", folder / "empty"
    for path in (home, empty):
        path.mkdir(mode=0o555)
    done = subprocess.run(
        [python, "-c", PROGRAM, *arguments],
        # All there is: no PATH with programs, no home that can be written.
        env={
            "PATH": str(empty),
            "HOME": str(home),
            "PYTHONPATH": PYTHONPATH,
            "PYTHONDONTWRITEBYTECODE": "1",
            "RWKV_JIT_MODE": "prebuilt",
            "RWKV_JIT_BUNDLE_PATH": str(bundle),
            **variables,
        },
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        cwd=empty,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split()


def make_read_only(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def open_to_all(folder: Path) -> Path:
    """A new folder that other users can get to, with its parents opened."""
    folder.mkdir()
    for path in (folder, *folder.parents):
        if stat.S_IMODE(path.stat().st_mode) & 0o005 != 0o005 and path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o055)
    return folder


@pytest.fixture
def public_folder(tmp_path: Path) -> Path:
    return open_to_all(tmp_path / "public")


@pytest.mark.parametrize("user", [None, NOBODY])
def test_a_bundle_runs_where_there_is_no_compiler_no_home_and_another_user(
    public_folder: Path, cpu_bundle: Bundle, user: int | None
) -> None:
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    python = python_for(user)
    if not python:
        pytest.skip(f"user {user} can run no Python of this version with torch")
    moved = public_folder / "elsewhere"
    shutil.copytree(cpu_bundle.root, moved)
    make_read_only(moved)
    before = tree(public_folder)
    who, error, origin, *used = stripped(
        public_folder, moved, "cpu", "8", "float32", python=python, user=user
    )
    # The CUDA driver makes a folder for itself in a home that it can write, as root can.
    after = {name: data for name, data in tree(public_folder).items() if ".nv" not in name}
    for name in ("home", "empty", "."):
        after.pop(name)
    before.pop(".")
    assert after == before
    assert int(who) == (os.getuid() if user is None else user)
    assert float(error) < 2e-5
    assert moved in Path(origin).parents
    assert len(used) == 2


@pytest.mark.gpu
def test_a_bundle_for_this_gpu_runs_with_nvcc_hidden(public_folder: Path, tmp_path: Path) -> None:
    arch = "{}.{}".format(*torch.cuda.get_device_capability())
    arch += "a" if arch == "9.0" else ""
    out = public_folder / "bundle"
    command = [sys.executable, "-m", "rwkv_jit", "bundle", "build", str(out)]
    subprocess.run(
        [*command, "--arch", arch, "--head-size", "64", "--dtype", "bf16"],
        # The build has no GPU.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        check=True,
    )
    make_read_only(out)
    loader_path = os.environ.get("LD_LIBRARY_PATH", "")
    _, error, origin, *_ = stripped(
        public_folder,
        out,
        "cuda",
        "64",
        "bfloat16",
        CUDA_HOME="/nonexistent",
        LD_LIBRARY_PATH=loader_path,
    )
    assert float(error) < 1.2e-2
    assert out in Path(origin).parents
