"""FLA's RWKV-6 and RWKV-7 models with FLA's kernels, then with ours: prints what differs, as JSON.

    python fla_program.py cpu|cuda

Without a GPU, FLA's kernels run in Triton's interpreter (set TRITON_INTERPRET=1). It cannot run the
chunked ones: there RWKV-6's is replaced by FLA's recurrent one, RWKV-7's by FLA's loop in PyTorch.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from rwkv_jit import used_configs
from rwkv_jit.compat import fla as ours
from rwkv_jit.compat.fla_backend import register

VOCABULARY, PROMPT = 97, 9
Results = dict[str, list[torch.Tensor]]


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def take_one_configuration() -> None:
    """Of each of FLA's kernels: nothing is timed here, and building them all takes minutes."""
    from triton.runtime.autotuner import Autotuner

    Autotuner.prune_configs = lambda self, _: self.configs[:1]


def loop_dplr(**given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FLA's own loop for its generalized delta rule, with the arguments of its kernel."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    assert given["cu_seqlens"] is None
    # Its q is scaled by K^-0.5.
    scale = given["scale"] * given["q"].shape[-1] ** 0.5
    tokens = [given[name].transpose(1, 2) for name in ("q", "k", "v", "a", "b", "gk")]
    state, wanted = given["initial_state"], given["output_final_state"]
    o, state = dplr_recurrence(tokens[0] * scale, *tokens[1:], state, wanted)
    return o.transpose(1, 2), state


def random_model(kind: str, device: str, **options: Any) -> torch.nn.Module:
    """A small model whose every parameter is random: several begin at zero."""
    from fla import models

    config = getattr(models, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, fuse_norm=False,
        fuse_cross_entropy=False, norm_eps=1e-3, **options,
    )  # fmt: skip
    model = getattr(models, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(device)


def trained(model: torch.nn.Module, ids: torch.Tensor) -> Results:
    """Logits of all tokens and gradients of all parameters."""
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return {"logits": [logits.detach()], "gradients": list(grads)}


@torch.no_grad()
def served(model: torch.nn.Module, ids: torch.Tensor) -> Results:
    """Logits of a prompt and of two tokens after it, one by one."""
    found, cache = [], None
    for part in (ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 1], ids[:, PROMPT + 1 : PROMPT + 2]):
        output = model(part, past_key_values=cache, use_cache=True)
        found.append(output.logits)
        cache = output.past_key_values
    return {"logits": found}


def main(device: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    take_one_configuration()
    import fla.ops.rwkv7.chunk as rwkv7
    from fla.layers import rwkv6
    from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
    from fla.ops.rwkv7 import chunk_rwkv7, fused_mul_recurrent_rwkv7, fused_recurrent_rwkv7

    models = {
        "RWKV6": random_model("RWKV6", device, num_heads=2, expand_k=1.0),
        "RWKV7": random_model("RWKV7", device, head_dim=32),
        # Its keys are half as wide as its values, which is FLA's default.
        "RWKV6, K < V": random_model("RWKV6", device, num_heads=2),
    }
    ids = torch.randint(VOCABULARY, (2, 20), device=device)
    runs: list[tuple[str, str, Callable[..., Results], torch.Tensor]] = [
        (name, way.__name__, way, tokens)
        for name in models
        for way, tokens in ((trained, ids), (served, ids))
    ]
    # From 65 tokens on FLA's RWKV-6 is chunked.
    runs.append(("RWKV6", "trained in chunks", trained, ids.repeat(1, 4)[:1, :70]))
    original = rwkv7.chunk_dplr_delta_rule
    if device == "cpu":
        rwkv6.chunk_rwkv6 = fused_recurrent_rwkv6
        rwkv7.chunk_dplr_delta_rule = loop_dplr
    truths = [way(models[name], tokens) for name, _, way, tokens in runs]
    rwkv7.chunk_dplr_delta_rule = original
    register()
    register()
    errors: dict[str, dict[str, float]] = {}
    for (name, label, way, tokens), truth in zip(runs, truths, strict=True):
        results = way(models[name], tokens)
        errors[f"{name} {label}"] = {
            kind: max(relative_rms(x, y) for x, y in zip(results[kind], truth[kind], strict=True))
            for kind in truth
        }
    functions = (
        chunk_rwkv6, fused_recurrent_rwkv6, chunk_rwkv7, fused_mul_recurrent_rwkv7,
        fused_recurrent_rwkv7, original,
    )  # fmt: skip
    report = {
        "errors": errors,
        "kernels": used_configs(),
        "signatures": {
            function.__name__: [parameters(inspect.unwrap(function)), parameters(mine)]
            for function in functions
            for mine in (getattr(ours, function.__name__),)
        },
    }
    print(json.dumps(report))


def parameters(function: Callable[..., Any]) -> list[list[str]]:
    found = inspect.signature(function).parameters.values()
    return [[p.name, repr(p.default)] for p in found if p.kind is not p.VAR_KEYWORD]


if __name__ == "__main__":
    main(sys.argv[1])
