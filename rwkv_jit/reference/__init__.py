"""Plain PyTorch operators: what the kernels are compared with, and RWKV_JIT_MODE=reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .cross_entropy import l2wrap_cross_entropy
from .decode import on_pool
from .elementwise import (
    a_gate,
    addcmul_mix,
    gate_output_correction,
    k_update,
    kk_pre,
    readout,
    relu_squared,
    token_shift_mix,
    vres_gate,
)
from .wkv5 import wkv5
from .wkv6 import wkv6
from .wkv7 import wkv7
from .wkv7_fused import wkv7_fused

REFERENCES: Mapping[str, Callable[..., Any]] = {
    "wkv5": wkv5,
    "wkv6": wkv6,
    "wkv7": wkv7,
    "wkv5_decode": on_pool(wkv5),
    "wkv6_decode": on_pool(wkv6),
    "wkv7_decode": on_pool(wkv7),
    "wkv7_decode_fused": on_pool(wkv7_fused),
    "wkv5_prefill": on_pool(wkv5, packed=True),
    "wkv6_prefill": on_pool(wkv6, packed=True),
    "wkv7_prefill": on_pool(wkv7, packed=True),
    "token_shift_mix": token_shift_mix,
    "a_gate": a_gate,
    "vres_gate": vres_gate,
    "kk_pre": kk_pre,
    "readout": readout,
    "relu_squared": relu_squared,
    "addcmul_mix": addcmul_mix,
    "k_update": k_update,
    "gate_output_correction": gate_output_correction,
    "l2wrap_cross_entropy": l2wrap_cross_entropy,
}
