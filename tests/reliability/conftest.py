"""What tests of faults share: a count of what was injected and of how long recovery took."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from crew import Note


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Tells tools/reliability.py what a test did: the fault in words, how many times it was
    injected, and the seconds that each recovery took, where that was measured. A test that passes
    has lost nothing."""

    def write(fault: str, injected: int, recovery: Sequence[float] = ()) -> None:
        data = {"fault": fault, "injected": injected, "recovery": max(recovery, default=None)}
        record_property("fault", json.dumps(data))

    return write


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody can get to and that root owns; pytest's are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="rwkv_jit_test.", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
