"""What the tests of the benchmark measure: something small, and nothing for long."""

from __future__ import annotations

import pytest

from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.bench.cases import Case, Shape
from rwkv_jit.config import OpConfig


@pytest.fixture
def case() -> Case:
    return Case(op="wkv7", shape=Shape(1, 20, 2, 8), dtype="fp32")


@pytest.fixture
def config(case: Case) -> OpConfig:
    return OpConfig(
        op=case.op,
        head_size=case.shape.head_size,
        dtype=case.dtype,
        chunk_length=16,
        arch=host_cpu_arch(),
    )
