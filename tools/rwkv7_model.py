"""An RWKV-7 ("x070") language model from the layers of `rwkv_jit.nn`, short enough to copy.

Parameters have RWKV-LM's names, so its checkpoints load. Letters: B batch, T tokens, H heads, N
head size, C = H * N channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rwkv_jit.nn import ChannelMix7, TimeMix7, TimeMix7State

HEAD_SIZE = 64


class LayerState(NamedTuple):
    """What one layer remembers of the tokens so far.

    att: of the time mix.
    ffn: [B, C]. Last input of the channel mix.
    """

    att: TimeMix7State
    ffn: Tensor


State = list[LayerState]


class Block(nn.Module):
    """One layer: time mix, then channel mix, each behind a LayerNorm and beside a residual."""

    def __init__(self, att: TimeMix7, ffn: ChannelMix7) -> None:
        super().__init__()
        width = att.ln_x.num_channels
        self.ln0 = nn.LayerNorm(width) if att.layer == 0 else nn.Identity()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att, self.ffn = att, ffn

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, LayerState]:
        """Return the output [B, T, C], v_first and what this layer remembers."""
        att, ffn = (None, None) if state is None else state
        x = self.ln0(x)
        y, v_first, att = self.att(
            self.ln1(x), v_first, att, output_state=True, cu_seqlens=cu_seqlens
        )
        x = x + y
        y, ffn = self.ffn(self.ln2(x), ffn, output_state=True, cu_seqlens=cu_seqlens)
        return x + y, v_first, LayerState(att, ffn)


class RWKV7(nn.Module):
    """The language model: embedding, layers, head.

    vocabulary: number of different tokens. width: C, a multiple of the head size.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, head_size: int = HEAD_SIZE
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            Block(TimeMix7(layer, layers, width, head_size), ChannelMix7(layer, layers, width))
            for layer in range(layers)
        )
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # ln0 brings it to size
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(vocabulary / width, 1)))

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Tensor]) -> RWKV7:
        """The model of a checkpoint of RWKV-LM, in float32."""
        vocabulary, width = checkpoint["emb.weight"].shape
        model = cls(vocabulary, width, 0)
        layers = 1 + max(int(name.split(".")[1]) for name in checkpoint if "blocks." in name)
        for layer in range(layers):
            att = TimeMix7.from_checkpoint(checkpoint, layer, layers, dtype=torch.float32)
            ffn = ChannelMix7.from_checkpoint(checkpoint, layer, layers, dtype=torch.float32)
            model.blocks.append(Block(att, ffn))
        model.load_state_dict(checkpoint)
        return model

    def forward(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the logits [B, T, vocabulary] and the state after the last token.

        tokens: [B, T], T >= 1. state: from an earlier call, to go on from there; None starts anew.
        cu_seqlens: [S + 1], with B = 1: sequences packed one after another.
        """
        x = self.emb(tokens)
        v_first, new_state = None, []
        for layer, block in enumerate(self.blocks):
            before = None if state is None else state[layer]
            x, v_first, remembered = block(x, v_first, before, cu_seqlens)
            new_state.append(remembered)
        return self.head(self.ln_out(x)), new_state
