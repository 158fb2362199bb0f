"""A small RWKV-7 ("x070") language model on top of rwkv_jit, short enough to copy.

The formulas, the initialisation and the parameter names are those of RWKV-LM, so its checkpoints
load with `load_state_dict`. Letters: B batch, T tokens, H heads, N head size, C = H * N channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_jit import get_op

HEAD_SIZE = 64


class LayerState(NamedTuple):
    """What one layer remembers of the tokens so far.

    att_shift, ffn_shift: [B, C]. Last input of the time mix and of the channel mix.
    wkv: [B, H, N, N] (value, key), float32. The recurrent state.
    """

    att_shift: Tensor
    wkv: Tensor | None
    ffn_shift: Tensor


State = list[LayerState]


class Projected(NamedTuple):
    """What the recurrence takes of each token, and what its result is finished with (g).

    Each [B, T, H, N], but g, which is [B, T, C].
    """

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    g: Tensor


class TimeMix(nn.Module):
    """RWKV-7's attention: a state per head, decayed and corrected by one rank-1 update a token."""

    def __init__(self, layer: int, layers: int, width: int) -> None:
        super().__init__()
        C, N = width, HEAD_SIZE
        self.layer, self.heads = layer, C // N
        depth = layer / max(layers - 1, 1)  # 0 in the first layer, 1 in the last
        height = 1 - layer / layers  # 1 in the first layer, near 0 in the last

        channel = torch.arange(C) / C
        self.x_r = _vector(1 - channel ** (0.2 * height))
        self.x_w = _vector(1 - channel ** (0.9 * height))
        self.x_k = _vector(1 - channel ** (0.7 * height))
        self.x_v = _vector(1 - channel ** (0.7 * height))
        self.x_a = _vector(1 - channel ** (0.9 * height))
        self.x_g = _vector(1 - channel ** (0.2 * height))

        ramp = torch.arange(C) / (C - 1)
        within_head = (torch.arange(C) % N) * 2 / (N - 1) - 1
        zigzag = within_head * within_head.abs()
        # Decays spread from long memory in the first channels to short memory in the last.
        self.w0 = _vector(-5.5 + 6 * ramp ** (1 + depth**0.3) + 2.5 * zigzag)
        self.a0 = _vector(-0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        self.w1, self.w2 = _low_rank(C, 2.5)
        self.a1, self.a2 = _low_rank(C, 2.5)
        self.g1, self.g2 = _low_rank(C, 5.0)
        if layer > 0:  # the first layer's values are the residual itself
            self.v0 = _vector(0.73 - 0.4 * (ramp - 0.5))
            self.v1, self.v2 = _low_rank(C, 1.7)

        self.k_k = _vector(0.71 - 0.1 * (ramp - 0.5))
        self.k_a = _vector(torch.full((C,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.heads, N), -0.04))
        self.receptance = _linear(C, C, 0.5)
        self.key = _linear(C, C, 0.05)
        self.value = _linear(C, C, 0.5)
        self.output = _linear(C, C, 0.0)
        self.ln_x = nn.GroupNorm(self.heads, C, eps=64e-5)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / layers) ** 0.7)

    def forward(
        self, x: Tensor, v_first: Tensor | None, shift: Tensor, wkv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the output [B, T, C], v_first and the new recurrent state.

        x: [B, T, C]. v_first: [B, T, C], values of the first layer; None in the first layer.
        shift: [B, C], the input before x. wkv: [B, H, N, N]; zeros if None.
        """
        projected, v_first = self.project(x, _shifted(x, shift), v_first)
        op = get_op("wkv7", head_size=HEAD_SIZE, dtype=x.dtype, device=x.device)
        y, wkv = op(*projected[:6], initial_state=wkv, output_final_state=True)
        return self.finish(y, projected), v_first, wkv

    def project(
        self, x: Tensor, before: Tensor, v_first: Tensor | None
    ) -> tuple[Projected, Tensor]:
        """What goes into the recurrence, and v_first.

        x, before: [B, T, C], tokens and the one before each.
        """
        heads = (*x.shape[:2], self.heads, HEAD_SIZE)
        dx = before - x
        xr, xw, xk, xv, xa, xg = (
            x + dx * mix for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # Softplus keeps w below -0.5, so the decay factor exp(-exp(w)) stays above 0.545.
        w = -F.softplus(-(self.w0 + torch.tanh(xw @ self.w1) @ self.w2)) - 0.5
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2)
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2

        kk = F.normalize((k * self.k_k).view(heads), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, w, k, v, a = (tensor.view(heads) for tensor in (r, w, k, v, a))
        return Projected(r, w, k, v, -kk, kk * a, g), v_first

    def finish(self, y: Tensor, projected: Projected) -> Tensor:
        """The output [B, T, C], from that of the recurrence, [B, T, H, N]."""
        r, _, k, v, _, _, g = projected
        B, T, C = g.shape
        y = self.ln_x(y.reshape(B * T, C)).view_as(r)
        y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v
        out: Tensor = self.output(y.view(B, T, C) * g)
        return out


class ChannelMix(nn.Module):
    """A feed-forward layer with a squared ReLU, over each token and the one before it."""

    def __init__(self, layer: int, layers: int, width: int) -> None:
        super().__init__()
        power = (1 - layer / layers) ** 4
        self.x_k = _vector(1 - (torch.arange(width) / width) ** power)
        self.key = _linear(width, 4 * width, 0.5)
        self.value = _linear(4 * width, width, 0.0)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x, before: [B, T, C], tokens and the one before each."""
        k = self.key(x + (before - x) * self.x_k)
        out: Tensor = self.value(torch.relu(k) ** 2)
        return out


class Block(nn.Module):
    """One layer: time mix, then channel mix, each behind a LayerNorm and beside a residual."""

    def __init__(self, layer: int, layers: int, width: int) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(width) if layer == 0 else nn.Identity()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(layer, layers, width)
        self.ffn = ChannelMix(layer, layers, width)

    def forward(
        self, x: Tensor, v_first: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        """Return the output [B, T, C], v_first and what this layer remembers."""
        x = self.ln0(x)
        start = x.new_zeros(x.shape[0], x.shape[2])
        att_shift, wkv, ffn_shift = (start, None, start) if state is None else state
        x_att = self.ln1(x)
        y, v_first, wkv = self.att(x_att, v_first, att_shift, wkv)
        x = x + y
        x_ffn = self.ln2(x)
        x = x + self.ffn(x_ffn, _shifted(x_ffn, ffn_shift))
        return x, v_first, LayerState(x_att[:, -1], wkv, x_ffn[:, -1])


class RWKV7(nn.Module):
    """The language model: embedding, layers, head.

    vocabulary: number of different tokens. width: C, a multiple of 64.
    """

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        if width < HEAD_SIZE or width % HEAD_SIZE:
            raise ValueError(f"width={width} must be a positive multiple of {HEAD_SIZE}")
        self.emb = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(layer, layers, width) for layer in range(layers))
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # ln0 brings it to size
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(vocabulary / width, 1)))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the logits [B, T, vocabulary] and the state after the last token.

        tokens: [B, T], T >= 1. state: from an earlier call, to go on from there; None starts anew.
        """
        x = self.emb(tokens)
        v_first, new_state = None, []
        for layer, block in enumerate(self.blocks):
            x, v_first, remembered = block(x, v_first, None if state is None else state[layer])
            new_state.append(remembered)
        return self.head(self.ln_out(x)), new_state


def _shifted(x: Tensor, before: Tensor) -> Tensor:
    """Each token's predecessor; `before` is that of the first."""
    return torch.cat([before.unsqueeze(1).to(x.dtype), x[:, :-1]], dim=1)


def _vector(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float().reshape(1, 1, -1))


def _low_rank(width: int, factor: float) -> tuple[nn.Parameter, nn.Parameter]:
    """Two factors whose product starts at zero; the rank is near factor * sqrt(width)."""
    rank = max(32, round(factor * math.sqrt(width) / 32) * 32)
    return (
        nn.Parameter(torch.zeros(width, rank)),
        nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width), gain=0.1)),
    )


def _linear(inputs: int, outputs: int, scale: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(linear.weight, -scale / math.sqrt(inputs), scale / math.sqrt(inputs))
    return linear
