"""Any order of putting, getting, dying, spoiling, trimming and clearing agrees with a model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rwkv_jit.cache import (
    LIBRARY_NAME,
    LOG_NAME,
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    Cache,
    Manifest,
    hash_file,
)
from rwkv_jit.cache.folders import process_scope
from rwkv_jit.cache.keys import digest_fields
from rwkv_jit.errors import CacheError

KEYS = st.integers(0, 3)
# No process has this id: it is beyond what the kernel gives.
DEAD = 1 << 22


class StoreMachine(RuleBasedStateMachine):
    """model: what each key's library holds; None where the entry is spoiled."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rwkv_jit_machine."))
        self.model: dict[int, bytes | None] = {}
        self.used: set[int] = set()
        self.number = 0
        self.cache = Cache(self.folder / "cache", max_bytes=0)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.cache.release()
            shutil.rmtree(self.folder)

    @staticmethod
    def fields(key: int) -> dict[str, str]:
        return {"operator": "wkv7", "key": str(key)}

    def path(self, key: int) -> Path:
        digest = digest_fields(self.fields(key))
        return self.cache.root / "v1" / "entries" / digest[:2] / digest

    def fill(self, key: int, *, steps: int = 9) -> tuple[Path, bytes]:
        """A staging folder for a key, with the first few of its files."""
        self.number += 1
        data = f"library {self.number}".encode()
        staging = self.cache.new_staging()
        files = (
            (LIBRARY_NAME, data),
            (LOG_NAME, b"log"),
            ("source.cpp", b"// source"),
        )
        for name, content in files[:steps]:
            (staging / name).write_bytes(content)
        if steps > len(files):
            library = staging / LIBRARY_NAME
            manifest = Manifest(
                schema=MANIFEST_SCHEMA,
                digest=digest_fields(self.fields(key)),
                meaning="m",
                identity="wkv7.forward",
                fields=self.fields(key),
                size=len(data),
                sha256=hash_file(library),
                build_seconds=1.0,
                created=f"{self.number:09d}",
                command="c++",
                resources={},
            )
            (staging / MANIFEST_NAME).write_text(manifest.to_json())
        return staging, data

    @rule(key=KEYS, replace=st.booleans())
    def put(self, key: int, replace: bool) -> None:
        staging, data = self.fill(key)
        digest = digest_fields(self.fields(key))
        spoiled = key in self.model and self.model[key] is None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            entry = self.cache.publish(staging, digest, replace=replace)
        assert len(caught) == (spoiled and not replace)
        if replace or self.model.get(key) is None:
            self.model[key] = data
        assert entry.library.read_bytes() == self.model[key]
        self.used.add(key)

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            entry = self.cache.lookup(digest_fields(self.fields(key)))
        wanted = self.model.get(key)
        assert (entry.library.read_bytes() if entry else None) == wanted
        assert len(caught) == (key in self.model and wanted is None)
        self.model = {k: v for k, v in self.model.items() if k != key or v is not None}
        self.used = (self.used | {key}) if entry else (self.used - {key})

    @rule(key=KEYS)
    def get_without_repair(self, key: int) -> None:
        spoiled = key in self.model and self.model[key] is None
        refused = False
        try:
            entry = self.cache.lookup(digest_fields(self.fields(key)), repair=False)
        except CacheError:
            refused = True
        else:
            assert (entry.library.read_bytes() if entry else None) == self.model.get(key)
            self.used |= {key} if entry else set()
        assert refused == spoiled
        self.used -= {key} if refused else set()

    @rule(key=KEYS, steps=st.integers(0, 9))
    def die(self, key: int, steps: int) -> None:
        staging, _ = self.fill(key, steps=steps)
        staging.rename(staging.with_name(f"{process_scope()}.{DEAD}.{self.number}"))

    @rule(key=KEYS, way=st.sampled_from(["cut", "flip", "lose", "empty", "link"]))
    def spoil(self, key: int, way: str) -> None:
        if self.model.get(key) is None:
            return
        library, manifest = self.path(key) / LIBRARY_NAME, self.path(key) / MANIFEST_NAME
        if way == "cut":
            library.write_bytes(library.read_bytes()[:-1])
        elif way == "flip":
            library.write_bytes(bytes(byte ^ 1 for byte in library.read_bytes()))
        elif way == "lose":
            library.unlink()
        elif way == "empty":
            manifest.write_bytes(b"")
        else:
            library.rename(self.folder / f"linked{self.number}")
            library.symlink_to(self.folder / f"linked{self.number}")
        self.model[key] = None

    @rule()
    def let_go(self) -> None:
        self.cache.release()
        self.used.clear()

    @rule(part=st.floats(0, 1))
    def trim(self, part: float) -> None:
        limit = int(self.cache.total_bytes() * part)
        planned = self.cache.trim(limit, dry_run=True)
        assert self.cache.trim(limit) == planned
        self.forget([path for path, _ in planned])
        kept_by_use = not set(self.model) - self.used
        assert self.cache.total_bytes() <= limit or kept_by_use

    @rule(dry_run=st.booleans())
    def clear(self, dry_run: bool) -> None:
        gone = self.cache.clear(dry_run=dry_run)
        if not dry_run:
            self.forget([path for path, _ in gone])
            assert set(self.model) <= self.used
            assert list(self.folder.glob("cache/v1/quarantine/*")) == []

    @rule(dry_run=st.booleans())
    def verify(self, dry_run: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bad = {path for path, _ in self.cache.verify(dry_run=dry_run)}
        assert bad == {self.path(key) for key, data in self.model.items() if data is None}
        if not dry_run:
            self.used -= {key for key, data in self.model.items() if data is None}
            self.model = {key: data for key, data in self.model.items() if data is not None}

    def forget(self, gone: list[Path]) -> None:
        keys = {key for key in self.model if self.path(key) in gone}
        assert not keys & self.used
        self.model = {key: data for key, data in self.model.items() if key not in keys}

    @invariant()
    def entries_are_those_of_the_model(self) -> None:
        if not hasattr(self, "folder"):
            return
        found = set(self.folder.glob("cache/v1/entries/*/*"))
        assert found == {self.path(key) for key in self.model}
        with contextlib.suppress(FileNotFoundError):
            for key, data in self.model.items():
                if data is not None:
                    assert (self.path(key) / LIBRARY_NAME).read_bytes() == data


StoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestStoreMachine = StoreMachine.TestCase
