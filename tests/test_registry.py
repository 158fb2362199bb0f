"""get_op: one object per configuration, cheap to ask for, and refusals that name the choices."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from comparing import random_call, reference, relative_rms
from rwkv_jit import Op, OpConfig, get_op, list_ops
from rwkv_jit import op as op_module
from rwkv_jit.errors import ArgumentError, ConfigError, KernelMissingError
from rwkv_jit.launch import announce_reference
from rwkv_jit.ops import SPECS
from rwkv_jit.render import render
from rwkv_jit.settings import Settings


def test_the_same_configuration_is_the_same_object() -> None:
    first = get_op(head_size=64, dtype=torch.float32, device="cpu")
    assert get_op("wkv7", head_size=64, dtype=torch.float32, device="cpu") is first
    assert get_op("wkv7", head_size=64, dtype=torch.float32, arch="cpu") is first
    explicit = get_op(
        "wkv7", head_size=64, dtype=torch.float32, device=torch.device("cpu"), chunk_length=16,
        state_dtype=torch.float32,
    )  # fmt: skip
    assert explicit is first
    assert get_op(head_size=32, dtype=torch.float32, device="cpu") is not first


def test_a_hit_costs_at_most_five_microseconds() -> None:
    def once() -> float:
        begin = time.perf_counter()
        for _ in range(1000):
            get_op("wkv7", head_size=64, dtype=torch.float32, device="cpu")
        return (time.perf_counter() - begin) / 1000

    assert min(once() for _ in range(20)) < 5e-6


def test_operators_are_listed() -> None:
    recurrences = ("wkv5", "wkv6", "wkv7")
    steps = ("token_shift_mix", "a_gate", "vres_gate", "kk_pre", "readout", "relu_squared")
    as_fla = ("addcmul_mix", "k_update", "gate_output_correction")
    assert list_ops() == (
        *recurrences,
        *(f"{name}_decode" for name in recurrences),
        "wkv7_decode_fused",
        *(f"{name}_prefill" for name in recurrences),
        *steps,
        *as_fla,
        "l2wrap_cross_entropy",
    )


def test_a_configuration_for_an_architecture_elsewhere_needs_no_gpu() -> None:
    op = get_op(head_size=128, dtype=torch.bfloat16, arch="9.0a", decay="logit")
    assert op.config == OpConfig.parse("wkv7_n128_bf16_l16_sm90a_logit")


def test_checkpoints_as_they_are_anyway_are_no_other_configuration() -> None:
    def slug(name: str, dtype: torch.dtype, kept: torch.dtype | None) -> str:
        op = get_op(name, head_size=64, dtype=dtype, arch="9.0a", checkpoint_dtype=kept)
        assert OpConfig.parse(op.config.slug) == op.config
        return op.config.slug

    bf16, fp32 = torch.bfloat16, torch.float32
    assert slug("wkv7", bf16, None) == slug("wkv7", bf16, bf16) == "wkv7_n64_bf16_l16_sm90a"
    assert slug("wkv7", bf16, fp32) == "wkv7_n64_bf16_l16_sm90a_caccumulator"
    assert slug("wkv6", bf16, None) == slug("wkv6", bf16, fp32) == "wkv6_n64_bf16_l16_sm90a"
    assert slug("wkv6", bf16, bf16) == "wkv6_n64_bf16_l16_sm90a_cbf16"
    assert slug("wkv7", fp32, fp32) == "wkv7_n64_fp32_l16_sm90a"


def test_a_declared_bound_is_another_kernel_only_where_one_makes_use_of_it() -> None:
    def chosen(lower_bound: float | None, **options: object) -> Op:
        choices = {"head_size": 64, "dtype": torch.bfloat16, "arch": "9.0a", **options}
        return get_op(lower_bound=lower_bound, **choices)  # type: ignore[arg-type]

    bounded = chosen(-0.61)
    assert bounded.config == OpConfig.parse("wkv7_n64_bf16_l16_sm90a_bounded")
    assert bounded.info()["bounded"]
    assert all(chosen(bound) is bounded for bound in (-8, -8.0, -1e-9, 0))
    assert not chosen(None).info()["bounded"]
    for options in (
        {},
        {"decay": "logit"},
        {"name": "wkv6"},
        {"dtype": torch.float32},
        {"dtype": torch.float16, "arch": "8.6", "head_size": 128},
        {"arch": "cpu"},
        {"chunk_length": 32},
    ):
        bound = -0.61 if options else -8.1
        assert chosen(bound, **options) is chosen(None, **options)
        assert chosen(-math.inf, **options) is chosen(None, **options)


def test_tensor_cores_serve_float16_where_decays_are_bounded_closely() -> None:
    def template(**options: object) -> str:
        op = get_op(head_size=64, dtype=torch.float16, arch="9.0a", **options)  # type: ignore[call-overload]
        return SPECS["wkv7"].variant(op.config, "forward").template

    assert template() == template(lower_bound=-0.62) == "wkv7_forward.cu"
    assert template(lower_bound=-0.61) == template(decay="logit") == "wkv7_chunked_forward.cu"


def test_tf32_is_another_kernel_only_where_one_makes_use_of_it() -> None:
    def chosen(precision: str, **options: object) -> Op:
        choices = {"head_size": 64, "dtype": torch.float32, "arch": "9.0a", **options}
        return get_op(precision=precision, **choices)  # type: ignore[arg-type]

    op = chosen("tf32")
    assert op.config == OpConfig.parse("wkv7_n64_fp32_l16_sm90a_tf32")
    assert op.info()["precision"] == "tf32"
    assert op.config.rounded_to == "tf32"
    assert SPECS["wkv7"].variant(op.config, "backward").template == "wkv7_chunked_backward.cu"
    bounded = OpConfig.parse("wkv7_n64_fp32_l16_sm90a_tf32_bounded")
    assert chosen("tf32", lower_bound=-0.61).config == bounded
    assert chosen("float32", lower_bound=-0.61) is chosen("float32")
    assert chosen("float32").info()["precision"] == "float32"
    assert chosen("tf32", name="wkv7_prefill").config.precision == "tf32"
    for options in (
        {"dtype": torch.bfloat16},
        {"arch": "12.0"},
        {"arch": "cpu"},
        {"head_size": 128},
        {"chunk_length": 32},
    ):
        assert chosen("tf32", **options) is chosen("float32", **options)


def test_a_slug_with_what_no_kernel_uses_is_refused() -> None:
    for slug in (
        "wkv7_n64_fp32_l16_sm90a_bounded",
        "wkv7_n64_bf16_l16_sm90a_logit_bounded",
        "wkv7_n64_bf16_l16_sm90a_tf32",
        "wkv7_n128_fp32_l16_sm90a_tf32",
    ):
        config = OpConfig.parse(slug)
        with pytest.raises(ConfigError, match=f"changes nothing in kernels like {slug}; leave it"):
            render(SPECS["wkv7"], config, "forward")


REFUSED = [
    ({"name": "wkv9"}, "operator 'wkv9' does not exist; choose from wkv5, wkv6, wkv7"),
    ({"head_size": 96, "arch": "9.0a"}, r"wkv7: head_size=96 is not supported on sm_90a; choose f"),
    (
        {"head_size": 12},
        r"wkv7: head_size=12 is not supported on x86_64_v\d; choose from 8, 16",
    ),
    ({"head_size": 0}, "wkv7: head_size=0 must be a whole number from 1 to 256"),
    ({"head_size": 64.0}, "wkv7: head_size=64.0 must be a whole number"),
    ({"chunk_length": 24}, "wkv7: chunk_length=24 is not supported on .*; choose from 16, 32, 64"),
    ({"dtype": torch.int8}, "dtype=torch.int8 is not supported; choose from bfloat16, float16"),
    ({"dtype": torch.float64, "arch": "8.0"}, "wkv7: dtype=fp64 is not supported on sm_80; choose"),
    ({"decay": "exp"}, "wkv7: decay='exp' is not known; choose from loglog, logit, log, f"),
    ({"decay": "factor"}, "wkv7: decay='factor' is not supported; choose from loglog, logit, log"),
    (
        {"name": "wkv6", "decay": "logit"},
        "wkv6: decay='logit' is not supported; choose from loglog",
    ),
    ({"state_layout": "nv"}, "wkv7: state_layout='nv' is not known; choose from vk, kv"),
    ({"state_dtype": torch.float64}, "wkv7: state_dtype='fp64' does not go with dtype='fp32'"),
    (
        {"checkpoint_dtype": torch.float16},
        "wkv7: checkpoint_dtype='fp16' is not known; choose from auto, accumulator, bf16",
    ),
    (
        {"checkpoint_dtype": torch.bfloat16},
        r"wkv7: checkpoint_dtype=bf16 is not supported on x86_64_v\d; leave it out",
    ),
    (
        {"checkpoint_dtype": torch.bfloat16, "arch": "9.0a"},
        "on sm_90a checkpoint_dtype=bf16 goes with dtype bf16, head_size 64 or 128 and chunk",
    ),
    ({"precision": "bf16"}, "wkv7: precision='bf16' is not known; choose from float32, tf32"),
    (
        {"name": "wkv6", "precision": "tf32", "arch": "9.0a"},
        "wkv6: has no precision, but it is 'tf32'; leave it out",
    ),
    (
        {"precision": "tf32", "checkpoint_dtype": torch.bfloat16, "arch": "9.0a"},
        "on sm_90a checkpoint_dtype=bf16 goes with dtype bf16, head_size 64 or 128 and chunk",
    ),
    ({"lower_bound": 0.5}, r"wkv7: lower_bound=0.5 must be a number of at most 0, .* leave it out"),
    ({"lower_bound": math.nan}, "wkv7: lower_bound=nan must be a number of at most 0"),
    ({"lower_bound": True}, "wkv7: lower_bound=True must be a number of at most 0"),
    ({"lower_bound": "-1", "name": "wkv6"}, "wkv6: lower_bound='-1' must be a number"),
    ({"build": "maybe"}, "wkv7: build='maybe' is not known; choose from auto, never, always"),
    ({"arch": "7.5"}, "arch='7.5' is too old; kernels need compute capability 8.0"),
    ({"arch": "hopper"}, "arch='hopper' is not an architecture"),
    ({"device": "mps", "arch": None}, "device='mps' is not supported; choose from cpu, cuda"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_no_kernel_serves_is_refused_with_the_choices(
    change: dict[str, object], message: str
) -> None:
    options = {"head_size": 64, "dtype": torch.float32, "arch": "cpu", **change}
    with pytest.raises((ConfigError, ArgumentError), match=message):
        get_op(**options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU; pass arch="):
        get_op(head_size=64, dtype=torch.float32, device="cuda")


def test_never_building_is_an_error_that_names_the_command() -> None:
    op = get_op(head_size=248, dtype=torch.float32, device="cpu", build="never")
    x = torch.randn(1, 1, 1, 248)
    with pytest.raises(KernelMissingError, match="rwkv-jit warm wkv7 --head-size 248 --dtype fp32"):
        op(x, x, x, x, x, x)


def test_info_says_what_it_is_and_where_it_came_from() -> None:
    op = get_op(head_size=16, dtype=torch.float32, device="cpu")
    op.load()
    info = op.info()
    assert info["slug"] == op.config.slug
    assert set(info["kernels"]) == {"forward", "backward"}
    for kernel in info["kernels"].values():
        assert Path(kernel["library"]).is_file()
        assert kernel["build_seconds"] > 0
    json.dumps(info)


def test_reference_mode_runs_the_recurrence_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(op_module, "current_settings", lambda: Settings(mode="reference"))
    announce_reference.cache_clear()
    # No kernel of this size is built anywhere in the tests.
    op = get_op(head_size=88, dtype=torch.bfloat16, device="cpu", decay="log")
    call = random_call(1, 5, 2, 88, w=torch.tensor(-0.5)).rounded(op)
    with caplog.at_level(logging.WARNING, logger="rwkv_jit"):
        for _ in range(2):
            y, final = op(*call.tokens.values(), call.initial_state, True)
    assert len(caplog.records) == 1
    assert "RWKV_JIT_MODE=reference" in caplog.text
    assert final is not None
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    truth = reference(op, call, gradients=False)
    assert relative_rms(y, truth["y"]) < 4e-3
    assert relative_rms(final, truth["final_state"]) < 1e-5
    assert not op.info()["kernels"]


@pytest.mark.parametrize("call", ["gc.enable()", "gc.disable()"])
def test_importing_leaves_the_garbage_collector_as_it_was(call: str) -> None:
    program = f"import gc; {call}; on = gc.isenabled(); from rwkv_jit import OpConfig; "
    check = "assert gc.isenabled() == on"
    subprocess.run([sys.executable, "-c", program + check], check=True)


def test_first_use_in_a_warm_process_is_quick(session_cache: Path) -> None:
    """At most 0.2 s beyond importing torch, of cores and not of a busy machine's clock; twice that
    is allowed where caches are shared with others."""
    op = get_op(head_size=64, dtype=torch.float32, device="cpu")
    op.load(backward=False)
    program = (
        "import os, torch; begin = sum(os.times()[:4]);"
        "from rwkv_jit import get_op; x = torch.randn(1, 4, 2, 64);"
        "get_op(head_size=64, dtype=torch.float32, device='cpu')(x, x, x, x, x, x);"
        "print(sum(os.times()[:4]) - begin)"
    )
    best = min(
        float(
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
        )
        for _ in range(3)
    )
    assert best < 0.4


def test_threads_that_ask_at_once_get_the_same_object() -> None:
    program = """
import threading
import torch
from concurrent.futures import ThreadPoolExecutor
from rwkv_jit import get_op

names, start = ("wkv7", "wkv7_decode"), threading.Barrier(8)

def ask(at):
    start.wait()
    return get_op(names[at % 2], head_size=64, dtype=torch.float32, device="cpu")

with ThreadPoolExecutor(8) as pool:
    assert len(set(pool.map(ask, range(8)))) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True)
