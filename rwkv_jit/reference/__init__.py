"""Plain PyTorch recurrences: what the kernels are compared with, and RWKV_JIT_MODE=reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .wkv7 import wkv7

Result = tuple[torch.Tensor, torch.Tensor | None]
REFERENCES: Mapping[str, Callable[..., Result]] = {"wkv7": wkv7}
