"""kk_pre: what RWKV-7 makes of a token's key before the recurrence.
k_update: the key that is added, alone."""

from __future__ import annotations

from .elementwise import Schedule, channels, elementwise, parameter
from .tensors import K, token

_RATE = "in-context learning rate, from 0 to 1"
_A = token("a", _RATE)
_K_K = parameter("k_k", "scale of the key that is removed")
_K_A = parameter("k_a", "how much of the rate scales the key that is added")

KK_PRE = elementwise(
    name="kk_pre",
    summary="RWKV-7's keys: the one that is added and the normalised one that is removed",
    formula="kk = (k * k_k) / max(|k * k_k|, 1e-12),   k * (1 + (a - 1) * k_a), -kk, kk * a",
    inputs=(K, _A, _K_K, _K_A),
    outputs=(
        token("new_k", "the key that is added"),
        token("neg_kk", "-kk, the recurrence's a"),
        token("kk_a", "kk * a, the recurrence's b"),
    ),
    saved=(K, _A, _K_K, _K_A),
    schedules={"forward": Schedule(2), "backward": Schedule(1)},
    heads=True,
)
_KEYS = (channels("k", "key"), channels("a", _RATE), _K_A)
K_UPDATE = elementwise(
    name="k_update",
    summary="RWKV-7's key that is added, without the one that is removed",
    formula="new_k = k * (1 + (a - 1) * k_a)",
    inputs=_KEYS,
    outputs=(channels("new_k", "the key that is added"),),
    saved=_KEYS,
    schedules={"forward": Schedule(2), "backward": Schedule(2)},
)
