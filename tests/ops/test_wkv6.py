"""wkv6: how it stands to wkv5."""

from __future__ import annotations

import pytest
import torch

from comparing import random_call, relative_rms, run
from rwkv_jit import get_op

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


@on_each_device
@pytest.mark.parametrize("decay", ["loglog", "log"])
def test_a_decay_that_is_the_same_for_all_tokens_gives_wkv5(device: str, decay: str) -> None:
    wkv5, wkv6 = (
        get_op(name, head_size=32, dtype=torch.float32, device=device, decay=decay)
        for name in ("wkv5", "wkv6")
    )
    call = random_call(3, 37, 2, 32, op="wkv5", w=-torch.rand(2, 32)).rounded(wkv5)
    results = run(wkv5, call, device)
    call.tokens["w"] = call.tokens["w"].expand(3, 37, 2, 32)
    other = run(wkv6, call, device)
    other["dw"] = other["dw"].double().sum((0, 1))
    for name, value in results.items():
        if name == "dw":
            assert relative_rms(value, other[name]) < 1e-5
        else:
            assert torch.equal(value, other[name]), name
