"""RWKV-7's layers as torch.nn modules, and its loss."""

from __future__ import annotations

from .channel_mix import ChannelMix7
from .loss import head_l2wrap_cross_entropy, l2wrap_cross_entropy
from .time_mix import Ranks, TimeMix7, TimeMix7State

__all__ = [
    "ChannelMix7",
    "Ranks",
    "TimeMix7",
    "TimeMix7State",
    "head_l2wrap_cross_entropy",
    "l2wrap_cross_entropy",
]
