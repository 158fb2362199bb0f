"""A training program as RWKV-LM has them now: it builds a kernel for each step of a block.

rwkv_lm_block_training.py OWN|PLAIN RESULTS trains a small RWKV-7 in bfloat16 on one batch, by its
kernels, or by PyTorch alone and in float32, and saves the losses and the gradients of the first
step. It knows nothing of ours.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.cpp_extension import load

HEAD_SIZE, CHUNK_LEN = 64, 16
WIDTH, VOCABULARY, BATCH, LENGTH, STEPS, LAYERS, RANK = 128, 64, 4, 48, 6, 2, 8
LEARNING_RATE = 0.1
HEADS = WIDTH // HEAD_SIZE
MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


def built(name, **options):
    flags = ["-res-usage", "--use_fast_math", "-O3"]
    return load(
        name=name,
        sources=[f"cuda/{name}.cpp", f"cuda/{name}.cu"],
        extra_cuda_cflags=flags,
        verbose=True,
        **options,
    )


def registered(name, kept=(), more=(), finish=None):
    """The forward of an extension in torch.ops, whose gradients are those of its backward.

    kept: places of the results that the backward is given. more: its last arguments, which the
    forward has, too. finish: from its results and the inputs to the gradients.
    """
    built(name, is_python_module=False)
    ops = getattr(torch.ops, name)

    def setup_context(ctx, inputs, output):
        ctx.single = isinstance(output, torch.Tensor)
        ctx.inputs = len(inputs) - len(more)
        ctx.save_for_backward(*inputs[: ctx.inputs], *(output[at] for at in kept))

    def backward(ctx, grads):
        grads = [grads] if ctx.single else grads[: len(grads) - len(kept)]
        found = ops.backward(*(grad.contiguous() for grad in grads), *ctx.saved_tensors, *more)
        if finish is not None:
            found = finish(found, ctx.saved_tensors)
        return (*found, *(None for _ in more))

    torch.library.register_autograd(f"{name}::forward", backward, setup_context=setup_context)
    return lambda *inputs: ops.forward(*(x.contiguous() for x in inputs), *more)


def sum_of_the_gate(found, inputs):
    dv, dv_first, before = found
    dv0 = before.sum(dim=(0, 1), keepdim=True)
    return dv, dv_first, dv0.to(inputs[2].dtype), before.to(inputs[3].dtype)


class Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, b):
        B, T, H, N = r.shape
        assert T % CHUNK_LEN == 0
        assert all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in (r, w, k, v, a, b))
        y = torch.empty_like(v)
        s = torch.empty(B, H, T // CHUNK_LEN, N, N, dtype=torch.float32, device=r.device)
        sa = torch.empty(B, T, H, N, dtype=torch.float32, device=r.device)
        torch.ops.rwkv7_clampw.forward(r, w, k, v, a, b, y, s, sa)
        ctx.save_for_backward(r, w, k, v, a, b, s, sa)
        return y

    @staticmethod
    def backward(ctx, dy):
        assert dy.dtype == torch.bfloat16
        *tokens, s, sa = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in tokens]
        torch.ops.rwkv7_clampw.backward(*tokens, dy.contiguous(), s, sa, *gradients)
        return tuple(gradients)


class ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        out, mixed, act = torch.ops.rwkv7_cmix_bf16_v5.forward(*(x.contiguous() for x in inputs))
        ctx.save_for_backward(*inputs, mixed, act)
        return out

    @staticmethod
    def backward(ctx, dout):
        return tuple(torch.ops.rwkv7_cmix_bf16_v5.backward(dout.contiguous(), *ctx.saved_tensors))


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, extension, logits, targets):
        loss, *kept = extension.forward(logits.contiguous(), targets.contiguous())
        ctx.extension = extension
        ctx.save_for_backward(logits, targets.view(-1), *kept)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dlogits = ctx.extension.backward(dloss.contiguous().float(), *ctx.saved_tensors)
        return None, dlogits, None


class Own:
    """The steps by kernels."""

    def __init__(self):
        built("rwkv7_clampw", is_python_module=False)
        built("rwkv7_cmix_bf16_v5", is_python_module=False)
        self._loss = built("rwkv7_l2wrap_ce_bf16_v2")
        self.mix6 = registered("rwkv7_tmix_mix6_bf16_v5")
        self._keys = registered("rwkv7_tmix_kk_pre_bf16_v5", kept=(3,), more=(HEAD_SIZE,))
        self._read = registered("rwkv7_tmix_lnx_rkvres_xg_bf16_v1", kept=(1, 2))
        self.a_gate = registered("rwkv7_tmix_a_gate_bf16")
        self.vres_gate = registered("rwkv7_tmix_vres_gate_bf16_v1", finish=sum_of_the_gate)

    def keys(self, *inputs):
        return self._keys(*inputs)[:3]

    def read(self, *inputs):
        return self._read(*inputs)[0]

    def recurrence(self, *tokens):
        heads = (x.view(*x.shape[:2], HEADS, HEAD_SIZE) for x in tokens)
        return Recurrence.apply(*heads).flatten(2)

    def channel_mix(self, *inputs):
        return ChannelMix.apply(*inputs)

    def loss(self, logits, targets):
        return Loss.apply(self._loss, logits, targets)


class Wrapped(torch.autograd.Function):
    """L2Wrap, as it is defined."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        (logits,) = ctx.saved_tensors
        largest, where = logits.max(-1, keepdim=True)
        factor = 1e-4 / where.numel()
        return dloss, dloss * torch.zeros_like(logits).scatter_(-1, where, largest * factor)


class Plain:
    """The steps by PyTorch."""

    def mix6(self, x, *mixes):
        before = F.pad(x, (0, 0, 1, -1)) - x
        return [x + before * mix for mix in mixes]

    def keys(self, k, k_k, a, k_a):
        kk = F.normalize((k * k_k).unflatten(-1, (HEADS, HEAD_SIZE)), dim=-1).flatten(2)
        return k * (1 + (a - 1) * k_a), -kk, kk * a

    def a_gate(self, a0, x):
        return torch.sigmoid(a0 + x)

    def vres_gate(self, v, v_first, v0, x):
        return v + (v_first - v) * torch.sigmoid(v0 + x)

    def recurrence(self, *tokens):
        r, w, k, v, a, b = (x.unflatten(-1, (HEADS, HEAD_SIZE)) for x in tokens)
        decay = torch.exp(-(math.e**-0.5) * torch.sigmoid(w))
        state = torch.zeros(len(r), HEADS, HEAD_SIZE, HEAD_SIZE)
        outputs = []
        for t in range(r.shape[1]):
            sa = torch.einsum("bhvk,bhk->bhv", state, a[:, t])
            state = state * decay[:, t, :, None] + torch.einsum("bhv,bhk->bhvk", sa, b[:, t])
            state = state + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
            outputs.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
        return torch.stack(outputs, 1).flatten(2)

    def read(self, x, r, k, v, r_k, weight, bias, g):
        normed = F.group_norm(x.flatten(0, 1), HEADS, weight, bias, eps=64e-5).view_as(x)
        r, k, v = (each.unflatten(-1, (HEADS, HEAD_SIZE)) for each in (r, k, v))
        return (normed + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(2)) * g

    def channel_mix(self, x, x_k, key, value):
        (mixed,) = self.mix6(x, x_k)
        return torch.relu(mixed @ key.T) ** 2 @ value.T

    def loss(self, logits, targets):
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return Wrapped.apply(loss, logits)


def matrix(rows, columns):
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


def vector(low, high):
    return nn.Parameter(torch.empty(1, 1, WIDTH).uniform_(low, high))


class Block(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixes = nn.ParameterDict({name: vector(0, 1) for name in MIXES})
        self.square = nn.ParameterDict({name: matrix(WIDTH, WIDTH) for name in "rkvo"})
        self.down = nn.ParameterDict({name: matrix(WIDTH, RANK) for name in "wavg"})
        self.up = nn.ParameterDict({name: matrix(RANK, WIDTH) for name in "wavg"})
        self.w0, self.a0, self.v0 = vector(-4, 1), vector(-1, 1), vector(-1, 1)
        self.k_k, self.k_a = vector(0.5, 1), vector(0.5, 1)
        self.r_k = nn.Parameter(torch.randn(HEADS, HEAD_SIZE) / 8)
        self.ln_x = nn.GroupNorm(HEADS, WIDTH, eps=64e-5)
        self.x_k, self.key, self.value = vector(0, 1), matrix(256, WIDTH), matrix(WIDTH, 256)

    def narrow(self, name, x):
        return x @ self.down[name] @ self.up[name]

    def forward(self, x, v_first):
        steps = self.steps
        mixes = (mix.view(-1) for mix in self.mixes.values())
        xr, xw, xk, xv, xa, xg = steps.mix6(self.ln1(x), *mixes)
        r, k, v = xr @ self.square["r"], xk @ self.square["k"], xv @ self.square["v"]
        w = self.w0 + self.narrow("w", xw)
        if v_first is None:
            v_first = v
        else:
            v = steps.vres_gate(v, v_first, self.v0, self.narrow("v", xv))
        a = steps.a_gate(self.a0, self.narrow("a", xa))
        g = torch.sigmoid(self.narrow("g", xg))
        k, neg_kk, kk_a = steps.keys(k, self.k_k.view(-1), a, self.k_a.view(-1))
        y = steps.recurrence(r, w, k, v, neg_kk, kk_a)
        y = steps.read(y, r, k, v, self.r_k, self.ln_x.weight, self.ln_x.bias, g)
        x = x + y @ self.square["o"]
        return x + steps.channel_mix(self.ln2(x), self.x_k.view(-1), self.key, self.value), v_first


class Model(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(steps) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x, v_first = self.emb(ids), None
        for block in self.blocks:
            x, v_first = block(x, v_first)
        return self.head(F.layer_norm(x, (WIDTH,)))


def train(steps, dtype):
    torch.manual_seed(0)
    # Both begin with parameters that bfloat16 has.
    model = Model(steps).bfloat16().to(dtype)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    masters = [p.detach().to(torch.float32, copy=True) for p in model.parameters()]
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss = steps.loss(model(ids[:, :-1]), ids[:, 1:].contiguous())
        model.zero_grad()
        loss.backward()
        gradients = gradients or {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                # The first layer has no gate between values.
                if p.grad is not None:
                    p.copy_(master.sub_(p.grad, alpha=LEARNING_RATE).bfloat16())
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


if __name__ == "__main__":
    way, results = sys.argv[1:]
    done = train(Own(), torch.bfloat16) if way == "OWN" else train(Plain(), torch.float32)
    torch.save(done, results)
