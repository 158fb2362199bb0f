"""freeze and used_configs, as a program calls them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rwkv_jit
from rwkv_jit.errors import ConfigError, KernelMissingError
from rwkv_jit.kernel_list import read_kernels


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    rwkv_jit.freeze("off")


def test_frozen_what_is_loaded_runs_and_what_must_be_built_is_an_error() -> None:
    op = rwkv_jit.get_op(head_size=8, dtype=torch.float32, device="cpu")
    op.load()
    rwkv_jit.freeze()
    x = torch.randn(1, 3, 1, 8)
    assert torch.isfinite(op(x, x, x, x, x, x)[0]).all()
    cold = rwkv_jit.get_op(head_size=232, dtype=torch.float32, device="cpu")
    with pytest.raises(KernelMissingError, match=r"(?s)--head-size 232.*nothing is built any more"):
        cold.load()


def test_what_was_used_is_written_for_warming(tmp_path: Path) -> None:
    op = rwkv_jit.get_op(head_size=8, dtype=torch.float32, device="cpu")
    op.load(backward=False)
    names = rwkv_jit.used_configs(tmp_path / "used.json")
    assert names == sorted(names)
    assert f"{op.config.slug}.forward" in names
    assert (op.config, "forward") in read_kernels(tmp_path / "used.json")


def test_freezing_in_another_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose from error, warn, off"):
        rwkv_jit.freeze("solid")  # type: ignore[arg-type]
