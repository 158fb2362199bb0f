"""RWKV-7's time mixing as a torch.nn module, with the parameters of RWKV-LM's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from .layer import Layer
from .operators import Operators
from .parameters import fill, fill_low_rank, fill_orthogonal, low_rank, vectors

# Of the normalisation of each head's output: 1e-5 for what is divided by 8, as RWKV-LM has it.
NORM_EPS = 64e-5


class Ranks(NamedTuple):
    """Inner sizes of the low-rank maps to decays (w), rates (a), shares of the first layer's values
    (v) and gates (g)."""

    w: int
    a: int
    v: int
    g: int

    @classmethod
    def suggested(cls, width: int) -> Ranks:
        """RWKV-LM's suggestion: multiples of 32 near a multiple of the root of the width."""
        return cls(*(max(32, round(x * math.sqrt(width) / 32) * 32) for x in (2.5, 2.5, 1.7, 5.0)))


class TimeMix7State(NamedTuple):
    """What time mixing remembers of a sequence.

    shift: [B or S, C]. The last token's input.
    wkv: [B or S, H, N, N], axes (value, key), float32. The recurrent state.
    """

    shift: Tensor
    wkv: Tensor


class Projected(NamedTuple):
    """What the recurrence takes (r to b), and the gate of its result; each [B, T, H, N]."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    g: Tensor


class TimeMix7(Layer):
    """RWKV-7's time mixing ("x070").

    layer: its number, from 0. The first has no v0, v1 and v2, and ignores those of a state dict.
    layers: how many the model has; the initialisation depends on both.
    width: C, a multiple of the head size.
    head_size: N, any that wkv7 has kernels for.
    ranks: of the low-rank maps; RWKV-LM's suggestion if None.
    device, dtype: of the parameters.

    Parameters have the names, shapes and initial values of RWKV-LM's `att`. Raises ArgumentError
    for sizes that do not fit.
    """

    part = "att"

    def __init__(
        self,
        layer: int,
        layers: int,
        width: int,
        head_size: int = 64,
        *,
        ranks: Ranks | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, layers)
        if head_size < 1 or width < head_size or width % head_size:
            raise ArgumentError(
                f"TimeMix7: width={width} must be a positive multiple of head_size={head_size}"
            )
        self.head_size = head_size
        names = {"token_shift_mix": None, "a_gate": None, "kk_pre": head_size, "wkv7": head_size,
                 "readout": head_size}  # fmt: skip
        self._operators = Operators(names if layer == 0 else {**names, "vres_gate": None})
        C, H = width, width // head_size
        ranks = Ranks.suggested(C) if ranks is None else ranks
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = vectors(6, C, **place)
        self.w0, self.a0, self.k_k, self.k_a = vectors(4, C, **place)
        self.w1, self.w2 = low_rank(C, ranks.w, **place)
        self.a1, self.a2 = low_rank(C, ranks.a, **place)
        self.g1, self.g2 = low_rank(C, ranks.g, **place)
        if layer > 0:
            (self.v0,) = vectors(1, C, **place)
            self.v1, self.v2 = low_rank(C, ranks.v, **place)
        self.r_k = nn.Parameter(torch.empty(H, head_size, **place))
        self.receptance = nn.Linear(C, C, bias=False, **place)
        self.key = nn.Linear(C, C, bias=False, **place)
        self.value = nn.Linear(C, C, bias=False, **place)
        self.output = nn.Linear(C, C, bias=False, **place)
        self.ln_x = nn.GroupNorm(H, C, eps=NORM_EPS, **place)
        self.reset_parameters()

    @classmethod
    def _sized_as(cls, part: Mapping[str, Tensor], layer: int, layers: int) -> TimeMix7:
        _, head_size = part["r_k"].shape
        # The first layer's v1 has no use, and may be missing.
        ranks = Ranks(*(part.get(f"{x}1", part["w1"]).shape[1] for x in "wavg"))
        width = part["x_r"].numel()
        return cls(layer, layers, width, head_size, ranks=ranks, device="meta")

    def reset_parameters(self) -> None:
        """Set every parameter to RWKV-LM's initial values."""
        C, N = self.r_k.numel(), self.head_size
        depth = self.layer / max(self.layers - 1, 1)  # 0 in the first layer, 1 in the last
        height = 1 - self.layer / self.layers  # 1 in the first layer, near 0 in the last
        place = self.x_r.device
        share = torch.arange(C, device=place) / C
        for mix, power in (
            (self.x_r, 0.2), (self.x_w, 0.9), (self.x_k, 0.7),
            (self.x_v, 0.7), (self.x_a, 0.9), (self.x_g, 0.2),
        ):  # fmt: skip
            fill(mix, 1 - share ** (power * height))

        ramp = torch.arange(C, device=place) / max(C - 1, 1)
        middle = max(N - 1, 1) / 2
        within_head = (torch.arange(C, device=place) % N - middle) / middle
        zigzag = within_head * within_head.abs()
        # From long memory in the first channels to short memory in the last.
        fill(self.w0, -5.5 + 6 * ramp ** (1 + depth**0.3) + 2.5 * zigzag)
        fill(self.a0, -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        maps = [(self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)]
        if self.layer > 0:
            fill(self.v0, 0.73 - 0.4 * (ramp - 0.5))
            maps.append((self.v1, self.v2))
        for first, second in maps:
            fill_low_rank(first, second)
        fill(self.k_k, 0.71 - 0.1 * (ramp - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        fill_orthogonal(self.receptance.weight, 1.0)
        fill_orthogonal(self.key.weight, 0.1)
        fill_orthogonal(self.value.weight, 1.0)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer) / self.layers) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        state: TimeMix7State | None = None,
        *,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, TimeMix7State | None]:
        """Return the output [B, T, C], v_first, and the state after the last token or None.

        x: [B, T, C], T >= 1.
        v_first: [B, T, C], what the first layer returned; the first layer ignores it.
        state: from an earlier call, to go on from there. None starts anew.
        output_state: whether to return the state.
        cu_seqlens: [S + 1], int32 or int64, with B = 1: sequences packed one after another.

        Raises ArgumentError for tensors that do not fit.
        """
        shift, wkv = (None, None) if state is None else state
        projected, v_first, last = self.project(
            x, v_first, shift, output_state=output_state, cu_seqlens=cu_seqlens
        )
        wkv7 = self._operators.of(x)["wkv7"]
        y, wkv = wkv7(*projected[:6], wkv, output_state, cu_seqlens)
        out = self.finish(y, projected)
        return out, v_first, None if wkv is None else TimeMix7State(last, wkv)

    def project(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Projected, Tensor, Any]:
        """What is before the recurrence, for servers that run one of their own: what it takes, for
        `decay="logit"`, then v_first, and the last input [B or S, C] or None.

        shift: [B or S, C], the input before the first; zeros if None. The rest as for a call.
        """
        if self.layer == 0:
            v_first = None
        elif v_first is None:
            raise ArgumentError(
                f"TimeMix7: v_first is None in layer {self.layer}; pass what the first layer's "
                "call returned"
            )
        ops = self._operators.of(x)
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg, last = ops["token_shift_mix"](
            x, *(mix.view(-1) for mix in mixes), shift, output_state, cu_seqlens
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = F.linear(torch.tanh(xw @ self.w1), self.w2.t(), self.w0.view(-1))
        a = ops["a_gate"]((xa @ self.a1) @ self.a2, self.a0.view(-1))
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            gate = (xv @ self.v1) @ self.v2
            v = ops["vres_gate"](v, v_first, gate, self.v0.view(-1))

        r, w, k, v, a, g = (part.unflatten(-1, self.r_k.shape) for part in (r, w, k, v, a, g))
        k, neg_kk, kk_a = ops["kk_pre"](k, a, self.k_k.view(-1), self.k_a.view(-1))
        # The raw w stands for d = exp(-exp(-1/2) sigmoid(w)), which is RWKV-LM's
        # exp(-exp(-softplus(-w) - 1/2)).
        return Projected(r, w, k, v, neg_kk, kk_a, g), v_first, last

    def finish(self, y: Tensor, projected: Projected) -> Tensor:
        """The output [B, T, C], from the recurrence's [B, T, H, N]."""
        r, _, k, v, _, _, g = projected
        readout, norm = self._operators.of(y)["readout"], self.ln_x
        y = readout(y, r, k, v, g, self.r_k, norm.weight, norm.bias, norm.eps)
        out: Tensor = self.output(y.flatten(2))
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.layer == 0:
            # RWKV-LM has these in its first layer too, where nothing reads them.
            state_dict = {
                name: tensor
                for name, tensor in state_dict.items()
                if name.removeprefix(prefix) not in ("v0", "v1", "v2")
            }
        super()._load_from_state_dict(state_dict, prefix, *others)
