"""The operators on tensor cores: spans of chunks, and the states that are kept between them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from comparing import (
    TOLERANCES,
    assert_matches_reference,
    dtype_options,
    random_call,
    relative_rms,
    run,
)
from rwkv_jit import Op, get_op
from rwkv_jit.config import MOST_SHARED
from rwkv_jit.ops import SPECS

CHUNKED = [("wkv7", 64), ("wkv7", 128), ("wkv6", 64), ("wkv5", 64)]
for_each_kernel = pytest.mark.parametrize(("name", "size"), CHUNKED)
for_each_dtype = pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        *((*kernel, "bf16") for kernel in CHUNKED),
        *(("wkv7", *row) for row in ((64, "fp16"), (128, "fp16"), (64, "tf32"))),
    ],
)


def on_tensor_cores(name: str, size: int, dtype: str = "bf16", **options: object) -> Op:
    if dtype == "fp16":
        options["decay"] = "logit"
    op = get_op(name, head_size=size, device="cuda", **dtype_options(dtype), **options)  # type: ignore[arg-type]
    assert "chunked" in SPECS[name].variant(op.config, "backward").template
    return op


@pytest.mark.gpu
@for_each_dtype
@pytest.mark.parametrize("length", [1, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 145, 300])
def test_tails_of_spans_match_the_reference(name: str, size: int, dtype: str, length: int) -> None:
    call = random_call(2, length, 2, size, op=name)
    assert_matches_reference(on_tensor_cores(name, size, dtype), call, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "dtype", "arch"),
    [(64, "bf16", "8.0"), (64, "bf16", "8.6"), (64, "tf32", "8.0"), (128, "bf16", "8.0")],
)
def test_kernels_for_less_shared_memory_match_the_reference(
    request: pytest.FixtureRequest, size: int, dtype: str, arch: str
) -> None:
    if not request.config.getoption("emulate_gpu"):
        pytest.skip("each runs on its own architecture alone, or emulated")
    op = get_op("wkv7", head_size=size, arch=arch, **dtype_options(dtype))
    assert_matches_reference(op, random_call(2, 70, 2, size), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("case", ["strongest", "weakest", "mixed", "identical", "large state"])
def test_float16_with_bounded_decays_matches_the_reference(size: int, case: str) -> None:
    w = {"strongest": [4.0], "weakest": [-9.0], "mixed": [-90.0, -5.0, 0.0, 90.0]}.get(case)
    shape = (2, 530, 2, size)
    call = random_call(
        *shape,
        w=None if w is None else torch.tensor(w).double()[torch.randint(len(w), shape)],
        identical=case == "identical",
        state_scale=100.0 if case == "large state" else 1.0,
    )
    assert_matches_reference(on_tensor_cores("wkv7", size, "fp16"), call, "cuda")


@pytest.mark.gpu
@for_each_dtype
def test_a_very_long_sequence_matches_the_float32_recurrence(
    name: str, size: int, dtype: str
) -> None:
    op = on_tensor_cores(name, size, dtype)
    precise = get_op(
        name, head_size=size, dtype=torch.float32, device="cuda", decay=op.config.decay
    )
    call = random_call(1, 32768, 2, size, op=name).rounded(op)
    found, truth = run(op, call, "cuda"), run(precise, call.rounded(precise), "cuda")
    output, gradient, _ = TOLERANCES[dtype]
    errors = {name: relative_rms(found[name], truth[name]) for name in truth}
    bad = {
        name: error
        for name, error in errors.items()
        if not error <= (gradient if name.startswith("d") else output)
    }
    assert not bad


@pytest.mark.gpu
@for_each_kernel
def test_rounded_checkpoints_change_gradients_alone_and_within_their_limits(
    name: str, size: int
) -> None:
    ops = [on_tensor_cores(name, size, checkpoint_dtype=x) for x in (torch.bfloat16, torch.float32)]
    call = random_call(2, 150, 2, size, op=name)
    for op in ops:
        assert_matches_reference(op, call, "cuda")
    rounded, whole = (run(op, call.rounded(op), "cuda") for op in ops)
    assert torch.equal(rounded["y"], whole["y"])
    assert not torch.equal(rounded["dr"], whole["dr"])
    packed = random_call(1, 100, 2, size, op=name, sequences=3)
    packed.cu_seqlens = torch.tensor([0, 33, 33, 100])
    assert_matches_reference(ops[0], packed, "cuda")


@pytest.mark.gpu
@for_each_dtype
@pytest.mark.parametrize("short", [1, 130, 200])
def test_a_sequence_of_a_batch_has_the_bits_that_it_has_alone(
    name: str, size: int, dtype: str, short: int
) -> None:
    """With so many short ones beside them turns of wkv7's backward are one span, as of a sequence
    alone, several spans whose D blocks wait for, or several that none waits for."""
    op = on_tensor_cores(name, size, dtype)
    bounds = [0, 1, 70, 70, 134, 333]
    others = range(334, 334 + short)
    batch = random_call(1, others[-1], 2, size, op=name, sequences=5 + short).rounded(op)
    batch.cu_seqlens = torch.tensor([*bounds, *others])
    together = run(op, batch, "cuda")
    of_sequences = {"final_state", "dinitial_state"}
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        one = random_call(1, end - begin, 2, size, op=name).rounded(op)
        one.tokens = {
            key: x[:, begin:end] if x.dim() == 4 else x for key, x in batch.tokens.items()
        }
        assert batch.initial_state is not None
        assert batch.dy is not None
        assert batch.dfinal_state is not None
        one.initial_state, one.dy = batch.initial_state[s : s + 1], batch.dy[:, begin:end]
        one.dfinal_state = batch.dfinal_state[s : s + 1]
        alone = run(op, one, "cuda")
        for key, value in alone.items():
            if key in of_sequences:
                assert torch.equal(value, together[key][s : s + 1]), key
            elif value.dim() == 4:
                assert torch.equal(value, together[key][:, begin:end]), key


@pytest.mark.gpu
def test_more_heads_than_blocks_share_have_the_bits_of_few(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("emulate_gpu"):
        pytest.skip("takes minutes")
    op = on_tensor_cores("wkv7", 64)
    many = random_call(MOST_SHARED // 32 + 1, 33, 32, 64).rounded(op)
    few = copy.copy(many)
    few.tokens = {key: x[:2] for key, x in many.tokens.items()}
    for name in ("initial_state", "dy", "dfinal_state"):
        setattr(few, name, getattr(many, name)[:2])
    together, alone = run(op, many, "cuda"), run(op, few, "cuda")
    for key, value in alone.items():
        assert torch.equal(value, together[key][:2]), key


@for_each_kernel
def test_info_tells_what_is_kept_for_the_backward(name: str, size: int) -> None:
    def kept(**options: object) -> float:
        op = get_op(name, head_size=size, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
        return float(op.info()["kept_bytes_per_token_and_head"])

    span, usual = (32, 2) if name == "wkv7" else (64, 4)
    assert kept(device="cpu", chunk_length=32) == size * size * 4 / 32
    assert kept(arch="9.0a") == size * size * usual / span
    for dtype in (torch.bfloat16, torch.float32):
        assert kept(arch="9.0a", checkpoint_dtype=dtype) == size * size * dtype.itemsize / span


@pytest.mark.parametrize(("arch", "warps"), [("9.0a", 12), ("9.0", 8), ("10.0", 8), ("8.0", 8)])
def test_warps_that_only_prepare_are_for_the_architecture_that_can_give_them_fewer_registers(
    arch: str, warps: int
) -> None:
    config = get_op("wkv7", head_size=128, dtype=torch.bfloat16, arch=arch).config
    assert SPECS["wkv7"].variant(config, "backward").constants(config)["warps"] == warps
