"""What every test gets: a seed from its name, a cache of the session's own, and silence."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores between the workers of pytest-xdist; OpenMP reads this when it is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """--emulate-gpu: run the gpu tests on a CPU, thread by thread."""
    parser.addoption("--emulate-gpu", choices=("plain", "checked"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU; torch is asked only if there are any."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or config.getoption("emulate_gpu"):
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def session_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The kernel cache of this test session, shared by the workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root = base / "rwkv_jit_cache"
    temporary = base / "tmp"
    temporary.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        # Build locks lie there, and caches where the user's cannot be written.
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        # Matplotlib keeps a list of fonts there.
        patch.setenv("MPLCONFIGDIR", str(temporary))
        patch.setenv("RWKV_JIT_CACHE_DIR", str(root))
        patch.setenv("RWKV_JIT_LOG_LEVEL", "quiet")
        patch.delenv("RWKV_JIT_MODE", raising=False)
        how = request.config.getoption("emulate_gpu")
        if how:
            from emulating import emulate_gpu

            emulate_gpu(request.config.cache.mkdir("emulated"), checked=how == "checked")
        yield root


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A number from the test's name, which also seeds random, NumPy and torch."""
    number = zlib.crc32(request.node.nodeid.encode())
    random.seed(number)
    # A test that uses one of these has imported it by now, or seeds it with this fixture's value.
    for name, seeding in (("numpy.random", "seed"), ("torch", "manual_seed")):
        module = sys.modules.get(name)
        if module is not None:
            getattr(module, seeding)(number)
    return number
