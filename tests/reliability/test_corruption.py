"""Bad entries: never loaded, put away, built again once, with one warning."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crew
from crew import Note
from rwkv_jit.cache import LIBRARY_NAME, MANIFEST_NAME
from rwkv_jit.errors import CacheError, KernelMissingError
from rwkv_jit.settings import Settings

THIS = Path(__file__).stem
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs an x86-64 compiler"
)


def truncate(entry: Path) -> None:
    os.truncate(entry / LIBRARY_NAME, (entry / LIBRARY_NAME).stat().st_size - 1)


def empty(entry: Path) -> None:
    os.truncate(entry / LIBRARY_NAME, 0)


def flip_a_bit(entry: Path) -> None:
    data = bytearray((entry / LIBRARY_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (entry / LIBRARY_NAME).write_bytes(data)


def take_another_library(entry: Path) -> None:
    other = entry.parents[1] / "other"
    shutil.copyfile(other / LIBRARY_NAME, entry / LIBRARY_NAME)


def take_another_entry(entry: Path) -> None:
    shutil.rmtree(entry)
    shutil.copytree(entry.parents[1] / "other", entry)


def take_another_entry_and_its_name(entry: Path) -> None:
    take_another_entry(entry)
    rewrite(entry, digest=entry.name)


def take_another_abi(entry: Path) -> None:
    manifest = json.loads((entry / MANIFEST_NAME).read_text())
    rewrite(entry, fields={**manifest["fields"], "abi": "999"})


def lose_the_manifest(entry: Path) -> None:
    (entry / MANIFEST_NAME).unlink()


def lose_the_library(entry: Path) -> None:
    (entry / LIBRARY_NAME).unlink()


def fill_with_garbage(entry: Path) -> None:
    (entry / MANIFEST_NAME).write_bytes(os.urandom(100))


def nest_deeply(entry: Path) -> None:
    (entry / MANIFEST_NAME).write_text("[" * 200_000)


def come_from_the_future(entry: Path) -> None:
    rewrite(entry, schema=999, novelty=[1])


def change_a_type(entry: Path) -> None:
    rewrite(entry, resources={"kernel": ["many"]})


def link_the_library(entry: Path) -> None:
    link(entry / LIBRARY_NAME)


def link_the_manifest(entry: Path) -> None:
    link(entry / MANIFEST_NAME)


def link_the_entry(entry: Path) -> None:
    link(entry)


def link_in_a_circle(entry: Path) -> None:
    (entry / LIBRARY_NAME).unlink()
    (entry / LIBRARY_NAME).symlink_to(LIBRARY_NAME)


def become_a_pipe(entry: Path) -> None:
    (entry / LIBRARY_NAME).unlink()
    os.mkfifo(entry / LIBRARY_NAME)


def become_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("an entry")


def rewrite(entry: Path, **changes: Any) -> None:
    manifest = json.loads((entry / MANIFEST_NAME).read_text())
    (entry / MANIFEST_NAME).write_text(json.dumps({**manifest, **changes}))


def link(path: Path) -> None:
    kept = path.parents[path.is_dir()] / f"kept-{path.name}"
    path.rename(kept)
    path.symlink_to(kept)


SPOILERS: tuple[Callable[[Path], None], ...] = (
    truncate,
    empty,
    flip_a_bit,
    take_another_library,
    take_another_entry,
    take_another_entry_and_its_name,
    take_another_abi,
    lose_the_manifest,
    lose_the_library,
    fill_with_garbage,
    nest_deeply,
    come_from_the_future,
    change_a_type,
    link_the_library,
    link_the_manifest,
    link_the_entry,
    link_in_a_circle,
    become_a_pipe,
    become_a_file,
)


def spoil(cache: str, counter: str, name: str) -> dict[str, Any]:
    """Spoil an entry, want it in prebuilt mode, then twice where building is allowed."""
    crew.hire_function(counter)
    entry = Path(crew.collect(crew.fork(lambda: crew.want(cache)))["path"])
    other = Path(crew.collect(crew.fork(lambda: crew.want(cache, 1)))["path"])
    other.rename(entry.parents[1] / "other")
    spoiler = {spoiler.__name__: spoiler for spoiler in SPOILERS}[name]
    spoiler(entry)

    def prebuilt() -> str:
        try:
            crew.want(cache, mode="prebuilt")
        except (CacheError, KernelMissingError) as error:
            return str(error)
        return ""

    refused = crew.collect(crew.fork(prebuilt))
    untouched = entry.is_symlink() or entry.exists()
    results = [crew.collect(crew.fork(lambda: crew.want(cache))) for _ in range(2)]
    return {"refused": refused, "untouched": untouched, "results": results}


@pytest.mark.parametrize("name", [spoiler.__name__ for spoiler in SPOILERS])
def test_spoiled_entry_is_put_away_and_built_once(name: str, tmp_path: Path, note: Note) -> None:
    cache, counter = tmp_path / "cache", tmp_path / "counter"
    done = crew.play(THIS, "spoil", cache, counter, name)
    assert "is not usable" in done["refused"]
    assert done["untouched"]
    first, second = done["results"]
    assert len(first["warnings"]) == 1
    assert "is not usable" in first["warnings"][0]
    assert second["warnings"] == []
    assert second["created"] == first["created"]
    assert crew.compiles(counter) == 3
    assert len(list(cache.glob("v1/quarantine/*"))) == 1
    note(f"entry spoiled: {name.replace('_', ' ')}", 1, [first["seconds"]])


def load_flipped(cache: str) -> list[str]:
    """Flip a bit in the code of a real library, load the kernel, and tell what was opened."""
    import ctypes
    import warnings

    from rwkv_jit.build import obtain
    from rwkv_jit.cache import hash_file
    from rwkv_jit.config import OpConfig
    from rwkv_jit.launch import load_kernel
    from rwkv_jit.ops import get_spec
    from rwkv_jit.render import render

    config = OpConfig.parse("wkv7_n8_fp32_l16_x86_64_v2")
    spec = get_spec("wkv7")
    settings = dataclasses.replace(Settings(cache_dir=Path(cache), log_level="quiet"))
    source = render(spec, config, "forward")
    entry = obtain(source, settings)
    good = entry.manifest.sha256
    flip_a_bit(entry.path)
    opened: list[str] = []
    real = ctypes.CDLL

    def watching(name: str, *arguments: Any, **options: Any) -> Any:
        opened.append(hash_file(Path(name)))
        return real(name, *arguments, **options)

    ctypes.CDLL = watching
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry = obtain(source, settings)
    load_kernel(spec, config, "forward", entry.library)
    return [opened == [entry.manifest.sha256], entry.manifest.sha256 == good]


@needs_compiler
def test_library_with_a_flipped_bit_is_never_opened(tmp_path: Path, note: Note) -> None:
    opened_good, same_again = crew.play(THIS, "load_flipped", tmp_path / "cache")
    assert opened_good
    assert same_again
    note("a bit of a loaded library's file flipped (real build)", 1)
