"""A training program as RWKV-LM has them: it builds its own kernel, and knows nothing of ours.

rwkv_lm_training.py OWN|PLAIN RESULTS trains a small RWKV-7 on one batch, by its kernel or by
PyTorch alone, and saves the losses and the gradients of the first step.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F
from torch.utils.cpp_extension import load

HEAD_SIZE, CHUNK_LEN = 64, 16
WIDTH, VOCABULARY, BATCH, LENGTH, STEPS = 128, 64, 4, 48, 8


class WindBackstepping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, q, k, v, z, b):
        B, T, H, C = w.shape
        assert T % CHUNK_LEN == 0
        assert all(i.dtype == torch.bfloat16 and i.is_contiguous() for i in (w, q, k, v, z, b))
        y = torch.empty_like(v)
        s = torch.empty(B, H, T // CHUNK_LEN, C, C, dtype=torch.float32, device=w.device)
        sa = torch.empty(B, T, H, C, dtype=torch.float32, device=w.device)
        torch.ops.wind_backstepping.forward(w, q, k, v, z, b, y, s, sa)
        ctx.save_for_backward(w, q, k, v, z, b, s, sa)
        return y

    @staticmethod
    def backward(ctx, dy):
        assert dy.dtype == torch.bfloat16
        assert dy.is_contiguous()
        *tokens, s, sa = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in tokens]
        torch.ops.wind_backstepping.backward(*tokens, dy, s, sa, *gradients)
        return tuple(gradients)


def own_kernel(*tokens):
    B, T, C = tokens[0].shape
    q, w, k, v, a, b = (i.view(B, T, C // HEAD_SIZE, HEAD_SIZE) for i in tokens)
    return WindBackstepping.apply(w, q, k, v, a, b).view(B, T, C)


def plain(*tokens):
    B, T, C = tokens[0].shape
    q, w, k, v, a, b = (i.view(B, T, C // HEAD_SIZE, HEAD_SIZE).float() for i in tokens)
    state = torch.zeros(B, C // HEAD_SIZE, HEAD_SIZE, HEAD_SIZE)
    outputs = []
    for t in range(T):
        sa = torch.einsum("bhvk,bhk->bhv", state, a[:, t])
        state = state * torch.exp(-torch.exp(w[:, t]))[:, :, None]
        state = state + torch.einsum("bhv,bhk->bhvk", sa, b[:, t])
        state = state + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1).reshape(B, T, C).to(tokens[0].dtype)


class Model(torch.nn.Module):
    def __init__(self, mixing):
        super().__init__()
        self.mixing = mixing
        self.emb = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norm = torch.nn.GroupNorm(WIDTH // HEAD_SIZE, WIDTH, eps=1e-3)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = F.layer_norm(self.emb(ids), (WIDTH,))
        B, T, C = x.shape
        q, w, k, v, a, gate = (projection(x) for projection in self.projections)
        w = -F.softplus(-w) - 0.5
        kk = F.normalize(a.view(B, T, -1, HEAD_SIZE), dim=-1).view(B, T, C)
        tokens = (q, w, k, v, -kk, kk * torch.sigmoid(gate))
        y = self.mixing(*(i.bfloat16().contiguous() for i in tokens)).float()
        return self.head(x + self.norm(y.view(B * T, C)).view(B, T, C))


def train(mixing):
    torch.manual_seed(0)
    model = Model(mixing)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


if __name__ == "__main__":
    way, results = sys.argv[1:]
    if way == "OWN":
        flags = ["-res-usage", f"-D_C_={HEAD_SIZE}", f"-D_CHUNK_LEN_={CHUNK_LEN}", "-O3"]
        for _ in range(2):
            load(
                name="wind_backstepping",
                sources=["cuda/wkv7_cuda.cu", "cuda/wkv7_op.cpp"],
                is_python_module=False,
                verbose=True,
                extra_cuda_cflags=flags,
            )
    torch.save(train(own_kernel if way == "OWN" else plain), results)
