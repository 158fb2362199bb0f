"""Checkpoints in RWKV-LM's format whose every parameter is random."""

from __future__ import annotations

from pathlib import Path

import torch

LAYERS, VOCABULARY, WIDTH, HEADS, HEAD_SIZE = 2, 97, 128, 2, 64


class _Parameters:
    """The parameters, as they are drawn."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def draw(self, name: str, *shape: int, scale: float = 0.05, mean: float = 0.0) -> None:
        self.found[name] = torch.randn(shape) * scale + mean

    def norm(self, name: str) -> None:
        self.draw(f"{name}.weight", WIDTH, mean=1.0)
        self.draw(f"{name}.bias", WIDTH)

    def mixes(self, prefix: str, names: str) -> None:
        for name in names:
            self.found[prefix + name] = torch.rand(1, 1, WIDTH)

    def matrix(self, name: str, rows: int = WIDTH, columns: int = WIDTH) -> None:
        self.draw(f"{name}.weight", rows, columns, scale=0.1)

    def of_rwkv7(self, block: str, *, first: bool) -> None:
        att = f"{block}att."
        self.mixes(f"{att}x_", "rwkvag")
        self.draw(f"{att}w0", 1, 1, WIDTH, scale=2.0, mean=-1.0)
        for name in "av":
            self.draw(f"{att}{name}0", 1, 1, WIDTH, scale=1.0)
        for name in "wavg":
            self.draw(f"{att}{name}1", WIDTH, 32)
            self.draw(f"{att}{name}2", 32, WIDTH)
        if first:
            for number in "012":
                del self.found[f"{att}v{number}"]
        for name in ("k_k", "k_a"):
            self.draw(att + name, 1, 1, WIDTH, mean=1.0)
        self.draw(f"{att}r_k", HEADS, HEAD_SIZE)
        self.mixes(f"{block}ffn.x_", "k")

    def of_rwkv6(self, block: str) -> None:
        att = f"{block}att."
        self.mixes(f"{att}time_maa_", "xwkvrg")
        self.mixes(f"{block}ffn.time_maa_", "kr")
        self.draw(f"{att}time_maa_w1", WIDTH, 5 * 32)
        self.draw(f"{att}time_maa_w2", 5, 32, WIDTH)
        self.draw(f"{att}time_decay", 1, 1, WIDTH, scale=2.0, mean=-1.0)
        self.draw(f"{att}time_decay_w1", WIDTH, 64)
        self.draw(f"{att}time_decay_w2", 64, WIDTH)
        self.draw(f"{att}time_faaaa", HEADS, HEAD_SIZE, scale=1.0)

    def of_rwkv5(self, block: str) -> None:
        self.mixes(f"{block}att.time_mix_", "kvrg")
        self.mixes(f"{block}ffn.time_mix_", "kr")
        self.draw(f"{block}att.time_decay", HEADS, HEAD_SIZE, scale=2.0, mean=-1.0)
        self.draw(f"{block}att.time_faaaa", HEADS, HEAD_SIZE, scale=1.0)


def write_checkpoint(path: Path, op: str) -> None:
    """A model whose time-mixing is `op`."""
    parameters = _Parameters()
    parameters.draw("emb.weight", VOCABULARY, WIDTH, scale=0.5)
    parameters.norm("blocks.0.ln0")
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        for name in ("ln1", "ln2", "att.ln_x"):
            parameters.norm(block + name)
        for name in ("receptance", "key", "value", "output"):
            parameters.matrix(f"{block}att.{name}")
        parameters.matrix(f"{block}ffn.key", 4 * WIDTH, WIDTH)
        parameters.matrix(f"{block}ffn.value", WIDTH, 4 * WIDTH)
        if op == "wkv7":
            parameters.of_rwkv7(block, first=layer == 0)
            continue
        parameters.matrix(f"{block}att.gate")
        parameters.matrix(f"{block}ffn.receptance")
        if op == "wkv6":
            parameters.of_rwkv6(block)
        else:
            parameters.of_rwkv5(block)
    parameters.norm("ln_out")
    parameters.matrix("head", VOCABULARY)
    torch.save(parameters.found, path)
