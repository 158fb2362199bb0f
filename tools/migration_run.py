"""One client of migration.py, one way: its results at a small size, and its times.

The way is "own", "ours" or "truth", which is the same weights and ours in float32, without times.
"""

from __future__ import annotations

import argparse
import importlib
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from rwkv_jit.bench.timing import time_of
from rwkv_jit.compat import rwkv_lm

HEAD_SIZE, SMALL_VOCABULARY = 64, 512
OPERATORS = {"x070": "RUN_CUDA_RWKV7g", "x060": "RUN_CUDA_RWKV6", "x052": "RUN_CUDA_RWKV5"}
Loss = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    for name in ("client", "way", "results"):
        parser.add_argument(name)
    for name, kind in (("layers", int), ("vocabulary", int), ("seconds", float)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("device", "shape"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--short-tuning", action="store_true")
    given = parser.parse_args()
    # Upstream's own.
    warnings.simplefilter("ignore")
    batch, length, heads = map(int, given.shape.split(","))
    times: dict[str, float] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        times[name] = time_of(work, given.device, given.seconds).median_ms

    fla = given.client.startswith("RWKV")
    client: Any = (Fla if fla else Trainer)(given.client, given.way)
    if fla and given.short_tuning:
        shorten_tuning()
    small = client.model(2, 2, SMALL_VOCABULARY).to(given.device, torch.bfloat16)
    ids = torch.randint(SMALL_VOCABULARY, (2, 129)).to(given.device)
    if given.way == "truth":
        torch.save({"gate": gradients(client.loss, small.float(), ids)}, given.results)
        return
    gate = gradients(client.loss, small, ids)
    if not fla:
        tokens = client.tokens(batch, length, heads, given.device)
        with torch.no_grad():
            measure("operator, forward", lambda: client.operator(tokens, heads))
        leaves = [x.requires_grad_() for x in tokens]
        dy = torch.randn_like(tokens[0])
        measure(
            "operator, forward and backward",
            lambda: torch.autograd.grad(client.operator(leaves, heads), leaves, dy),
        )
        del tokens, leaves, dy
    model = client.model(given.layers, heads, given.vocabulary).to(given.device, torch.bfloat16)
    ids = torch.randint(given.vocabulary, (batch, length + 1), device=given.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        client.loss(model, ids)[0].backward()
        optimizer.step()

    measure("training step", step)
    torch.save({"gate": gate, "times": times}, given.results)


def gradients(loss_of: Loss, model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and the gradients of all parameters."""
    loss, logits = loss_of(model, ids)
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach().cpu() for name, x in {"logits": logits, **named}.items()}


def shorten_tuning() -> None:
    """Leave out the configurations of FLA's kernels that take the most of the tuning's time."""
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    prune = autotuner.prune_configs

    def prune_more(self: Any, given: dict[str, Any]) -> list[Any]:
        found: list[Any] = prune(self, given)
        few = [
            config
            for config in found
            if config.num_warps < 32
            and all(config.kwargs.get(name, 0) <= HEAD_SIZE for name in ("BK", "BV"))
        ]
        return few or found

    autotuner.prune_configs = prune_more


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """With every parameter random: several begin at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


class Trainer:
    """rwkv-trainer: it builds its kernels when it is imported."""

    def __init__(self, version: str, way: str) -> None:
        exact = way == "truth"
        os.environ.update(
            RWKV_MY_TESTING=version, RWKV_JIT_ON=str(int(not exact)), RWKV_TRAIN_TYPE="",
            RWKV_HEAD_SIZE_A=str(HEAD_SIZE), RWKV_CTXLEN="4096", RWKV_FLOAT_MODE="bf16",
        )  # fmt: skip
        self._version = version
        self._package: Any = importlib.import_module("rwkv_trainer.model.model")
        if exact:
            # Its own take bfloat16 alone.
            name = OPERATORS[version]
            setattr(self._package, name, getattr(rwkv_lm, name))

    def model(self, layers: int, heads: int, vocabulary: int) -> torch.nn.Module:
        torch.manual_seed(0)
        width = heads * HEAD_SIZE
        given = types.SimpleNamespace(
            n_layer=layers, n_embd=width, dim_att=width, dim_ffn=4 * width, head_size_a=HEAD_SIZE,
            head_size_divisor=8, vocab_size=vocabulary, ctx_len=4096, my_testing=self._version,
            train_type="", pre_ffn=0, my_pos_emb=0, dropout=0, head_qk=0, tiny_att_dim=-1,
            tiny_att_layer=-1, grad_cp=0,
        )  # fmt: skip
        return randomised(self._package.RWKV(given))

    @staticmethod
    def loss(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Its kernels take T in sixteens.
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), logits

    def tokens(self, batch: int, length: int, heads: int, device: str) -> list[torch.Tensor]:
        """In the order of the client's function."""
        torch.manual_seed(1)
        shape = (batch, length, heads, HEAD_SIZE)
        r, w, k, v, x = (torch.randn(shape, device=device) for _ in range(5))
        if self._version == "x070":
            kk = F.normalize(x, dim=-1)
            tokens = [r, w - 2, k, v, -kk, kk * torch.rand(shape, device=device)]
        else:
            w = w if self._version == "x060" else w[0, 0]
            tokens = [r, k, v, w - 2, x[0, 0]]
        return [(y.flatten(2) if y.dim() == 4 else y).bfloat16() for y in tokens]

    def operator(self, tokens: list[torch.Tensor], heads: int) -> torch.Tensor:
        batch, length, width = tokens[0].shape
        sizes = (batch, length, width, heads) if self._version == "x052" else ()
        y = getattr(self._package, OPERATORS[self._version])(*sizes, *tokens)
        assert isinstance(y, torch.Tensor)
        return y


class Fla:
    """FLA's models."""

    def __init__(self, kind: str, way: str) -> None:
        self._kind = kind
        self._models: Any = importlib.import_module("fla.models")
        if way != "own":
            from rwkv_jit.compat.fla_backend import register  # noqa: PLC0415

            register()

    def model(self, layers: int, heads: int, vocabulary: int) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"head_dim": HEAD_SIZE}
        if self._kind == "RWKV6":
            sizes = {"num_heads": heads, "expand_k": 1.0}
        config = getattr(self._models, f"{self._kind}Config")(
            hidden_size=heads * HEAD_SIZE, num_hidden_layers=layers, vocab_size=vocabulary,
            fuse_cross_entropy=False, **sizes,
        )  # fmt: skip
        return randomised(getattr(self._models, f"{self._kind}ForCausalLM")(config))

    @staticmethod
    def loss(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), logits


if __name__ == "__main__":
    main()
