"""Extensions that programs build, with our operators behind them, used as those programs do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from comparing import TOLERANCES, random_call, reference, relative_rms
from rwkv_jit import get_op
from rwkv_jit.compat.extensions import EXTENSIONS, INTEGERS, Function
from rwkv_jit.compat.intercept import intercept, registered
from rwkv_jit.errors import ArgumentError, RwkvJitError
from rwkv_jit.launch import TORCH_DTYPES

Tensors = dict[str, torch.Tensor]
Program = Callable[[Tensors, Tensors], Tensors]
CHUNK = 16
ONE_STATE = torch.zeros(1, 2, 32, 32)

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for torch's own `load`; the names that it was called with."""
    names: list[str] = []
    monkeypatch.setattr(cpp_extension, "load", lambda name, *_, **__: names.append(name))
    return names


@pytest.fixture
def load(original: list[str]) -> Iterator[Callable[..., Any]]:
    """`load` as a program has it while it is intercepted."""
    with intercept():
        yield cpp_extension.load
    assert original == []


def empty(*likes: torch.Tensor) -> list[torch.Tensor]:
    """Buffers full of NaN."""
    return [torch.full_like(like, torch.nan) for like in likes]


def buffers(r: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    """Upstream's for what its backward reads: states of each `chunk` tokens, and a vector each."""
    batch, length, heads, size = r.shape
    shapes = ((batch, heads, length // chunk, size, size), (batch, length, heads, size))
    return [torch.full(shape, torch.nan, device=r.device) for shape in shapes]


# A program takes tokens and state, and gradients of results; it returns results and gradients.
# Those of RWKV-7 have tokens [B, T, H, N], the others [B, T, C].
def wind_backstepping(x: Tensors, given: Tensors, *, chunk: int = CHUNK) -> Tensors:
    ops, (y,) = torch.ops.wind_backstepping, empty(x["v"])
    arguments = [x[name] for name in "wrkvab"]
    scratch = buffers(y, chunk)
    ops.forward(*arguments, y, *scratch)
    assert scratch[1].isnan().all(), "it is left as it was"
    if chunk < CHUNK:
        assert scratch[0].flatten()[0].isfinite(), "checkpoints have room in it"
    gradients = empty(*arguments)
    ops.backward(*arguments, given["y"], *scratch, *gradients)
    return {"y": y, **dict(zip(("dw", "dr", "dk", "dv", "da", "db"), gradients, strict=True))}


def clampw(
    x: Tensors, given: Tensors, *, namespace: str, starts: bool, ends: bool, chunk: int = CHUNK
) -> Tensors:
    ops, (y,) = getattr(torch.ops, namespace), empty(x["v"])
    tokens = [x[name] for name in "rwkvab"]
    state, final = [x["initial_state"]] if starts else [], []
    if ends:
        final = empty(x["initial_state"])
    scratch = buffers(y, chunk)
    ops.forward(*state, *tokens, y, *final, *scratch)
    gradients = empty(*state, *tokens)
    ops.backward(
        *tokens, given["y"], *([given["final_state"]] if ends else []), *scratch, *gradients
    )
    names = [*(["dinitial_state"] if starts else []), "dr", "dw", "dk", "dv", "da", "db"]
    found = {"y": y, **dict(zip(names, gradients, strict=True))}
    return {**found, "final_state": final[0]} if ends else found


def sizes(x: Tensors) -> tuple[int, int, int, int]:
    return (*x["r"].shape, x["u"].shape[0])  # type: ignore[return-value]


def wkv6(x: Tensors, given: Tensors, *, logarithm: bool = False, state: bool = False) -> Tensors:
    module = registered("wkv6state" if state else "wkv6")
    tokens = [x[name] for name in "rkvwu"]
    (y,) = empty(x["v"])
    batch = y.shape[0]
    if logarithm:
        tokens[3] = -torch.exp(x["w"].float())
    gradients = empty(*tokens[:3], y, x["u"].new_empty(batch, y.shape[-1]))
    if state:
        tokens.append(x["initial_state"])
        gradients += empty(x["initial_state"])
    module.forward(*sizes(x), *tokens, y)
    module.backward(*sizes(x), *tokens, given["y"], *gradients)
    gradients[4] = gradients[4].sum(0).view_as(x["u"])
    names = ("dr", "dk", "dv", "dw", "du", "dinitial_state")
    return {"y": y, **dict(zip(names, gradients, strict=False))}


def wkv5(x: Tensors, given: Tensors) -> Tensors:
    module = registered("wkv5")
    tokens = [x[name] for name in "rkv"]
    logarithm = -torch.exp(x["w"].float())
    factor = torch.exp(logarithm)
    (y,) = empty(x["v"])
    module.forward(*sizes(x), *tokens, factor, x["u"], y)
    rows = x["u"].new_empty(y.shape[0], y.shape[-1])
    gradients = empty(*tokens, rows, rows)
    module.backward(*sizes(x), *tokens, factor, logarithm, x["u"], given["y"], *gradients)
    gradients[3:] = [rows.sum(0).view_as(x["u"]) for rows in gradients[3:]]
    return {"y": y, **dict(zip(("dr", "dk", "dv", "dw", "du"), gradients, strict=True))}


def wkv7(x: Tensors, given: Tensors) -> Tensors:
    batch, length, heads, size = x["r"].shape
    (y,) = empty(x["r"].flatten(2))
    tokens = [x[name].flatten(2) for name in "rwkvab"]
    torch.ops.wkv7.forward(batch, length, heads * size, heads, *tokens, y)
    return {"y": y}


def wkv7s(x: Tensors, given: Tensors) -> Tensors:
    batch, length, heads, size = x["r"].shape
    (y,) = empty(x["r"].flatten(2))
    state = x["initial_state"].clone()
    tokens = [x[name].flatten(2) for name in "rwkvab"]
    forward = getattr(torch.ops.wkv7s, f"forward_{'fp32' if y.dtype == torch.float32 else 'bf16'}")
    forward(batch, length, heads * size, heads, state, *tokens, y)
    return {"y": y, "final_state": state}


def inference(x: Tensors, given: Tensors, *, op: str) -> Tensors:
    module = registered(op)
    (y,) = empty(x["v"])
    state = x["initial_state"].clone()
    factor = torch.exp(-torch.exp(x["w"].float()))
    tokens = [x[name] for name in "rkv"]
    module.forward_fp32(*sizes(x), state, *tokens, factor, x["u"], y)
    return {"y": y, "final_state": state}


# By the extension's name, and what is special about the way of calling it.
PROGRAMS: dict[tuple[str, str], Program] = {
    ("wind_backstepping", ""): wind_backstepping,
    ("wind_backstepping", "room for checkpoints"): functools.partial(wind_backstepping, chunk=8),
    ("rwkv7_clampw", ""): functools.partial(
        clampw, namespace="rwkv7_clampw", starts=False, ends=False
    ),
    ("rwkv7_clampw_v3", ""): functools.partial(
        clampw, namespace="rwkv7_clampw_v3", starts=False, ends=False
    ),
    ("rwkv7_state_clampw", ""): functools.partial(
        clampw, namespace="rwkv7_state_clampw", starts=True, ends=False
    ),
    ("rwkv7_statepassing_clampw", ""): functools.partial(
        clampw, namespace="rwkv7_statepassing_clampw", starts=True, ends=True
    ),
    ("rwkv7_statepassing_clampw", "room for checkpoints"): functools.partial(
        clampw, namespace="rwkv7_statepassing_clampw", starts=True, ends=True, chunk=8
    ),
    ("wkv7", ""): wkv7,
    ("wkv7s", ""): wkv7s,
    ("wkv6", ""): wkv6,
    ("wkv6", "logarithm of the decay"): functools.partial(wkv6, logarithm=True),
    ("wkv6state", ""): functools.partial(wkv6, state=True),
    ("wkv5", ""): wkv5,
    ("rwkv6", ""): functools.partial(inference, op="rwkv6"),
    ("rwkv5", ""): functools.partial(inference, op="rwkv5"),
}


def check(
    name: str, program: Program, dtype: str, size: int, length: int, device: str = "cpu"
) -> None:
    extension = EXTENSIONS[name]
    op = get_op(
        extension.op, head_size=size, dtype=TORCH_DTYPES[dtype], device=device,
        decay=extension.decay,
    )  # fmt: skip
    call = random_call(2, length, 3, size, op=extension.op).rounded(op)
    assert call.initial_state is not None
    assert call.dfinal_state is not None
    assert call.dy is not None
    x: Tensors = {**call.tokens, "initial_state": call.initial_state}
    given = {"y": call.dy, "final_state": call.dfinal_state}
    if extension.op != "wkv7":
        x = {key: value.flatten(2) if key in "rkvw" and value.dim() == 4 else value
             for key, value in x.items()}  # fmt: skip
        given["y"] = call.dy.flatten(2)
    found = program(*({key: t.to(device) for key, t in each.items()} for each in (x, given)))
    starts = {"dinitial_state", "final_state"} & found.keys()
    call = replace(
        call,
        initial_state=call.initial_state if starts else None,
        dfinal_state=call.dfinal_state * float("final_state" in found),
    )
    truth = reference(op, call)
    output, gradient, of_w = TOLERANCES[dtype]
    for key, value in found.items():
        limit = of_w if key == "dw" else gradient if key.startswith("d") else output
        assert relative_rms(value, truth[key].reshape(value.shape)) <= limit, key


def test_every_extension_that_writes_has_a_program_here() -> None:
    writing = {name for name, each in EXTENSIONS.items() if "!" in "".join(each.functions.values())}
    assert {name for name, _ in PROGRAMS} == writing


@on_each_device
# That the logarithm is passed is seen by its dtype, another than the tokens'.
@pytest.mark.parametrize(
    ("name", "way"), [key for key in PROGRAMS if key[1] != "logarithm of the decay"]
)
def test_results_and_gradients_match_the_reference_in_float32(
    name: str, way: str, device: str, load: Callable[..., Any]
) -> None:
    load(name=name, sources=["nowhere.cu"], is_python_module=False, extra_cuda_cflags=["-D_N_=32"])
    check(name, PROGRAMS[name, way], "fp32", 32, 32, device)


@on_each_device
@pytest.mark.parametrize(
    ("name", "way"),
    [key for key in PROGRAMS if key[0] in ("wind_backstepping", "wkv5", "wkv6", "wkv6state")],
)
def test_results_and_gradients_match_the_reference_in_bfloat16(
    name: str, way: str, device: str, load: Callable[..., Any]
) -> None:
    load(name, ["nowhere.cu"], extra_cuda_cflags=["-D_N_=64"])
    check(name, PROGRAMS[name, way], "bf16", 64, 48, device)


def test_one_load_serves_every_head_size_and_length(load: Callable[..., Any]) -> None:
    load(name="wind_backstepping", sources=[], extra_cuda_cflags=["-D_C_=64"])
    for size, length in ((32, 1), (64, 21)):
        check("wind_backstepping", wind_backstepping, "fp32", size, length)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torchscript_calls_them(load: Callable[..., Any]) -> None:
    load(name="wkv7s", sources=[], is_python_module=False)

    def run(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.ops.wkv7s.forward_fp32(1, x.size(0), x.size(1), 1, state, x, x, x, x, x, x, y)
        return y

    x = torch.randn(5, 32) / 8
    states = torch.zeros(2, 1, 32, 32)
    scripted = torch.jit.script(run)(states[0], x)
    assert torch.equal(scripted, run(states[1], x))
    assert torch.equal(states[0], states[1])
    assert states[0].any()


def test_torch_compile_keeps_them_in_one_graph(load: Callable[..., Any]) -> None:
    load(name="wkv7s", sources=[], is_python_module=False)

    def run(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.ops.wkv7s.forward_fp32(1, 5, 32, 1, state, x, x, x, x, x, x, y)
        return y * 2

    x, states = torch.randn(5, 32) / 8, torch.zeros(2, 1, 32, 32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(states[0], x)
    assert torch.equal(compiled, run(states[1], x))
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("name", EXTENSIONS)
def test_no_size_of_a_schema_is_a_tensor_and_every_buffer_is_mutable(name: str) -> None:
    for function in EXTENSIONS[name].functions:
        schema = torch._C.parse_schema(Function(EXTENSIONS[name], function).schema)
        for argument in schema.arguments:
            assert (str(argument.type) == "int") == (argument.name in INTEGERS)
        written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        assert bool(written) != bool(schema.returns)
        assert not written & set("rwkvabu")


def test_an_unknown_name_goes_to_the_original(original: list[str]) -> None:
    with intercept():
        cpp_extension.load("rwkv7_l2wrap_bf16_v2", ["l2wrap.cu"], verbose=True)
        cpp_extension.load(name="wkv_of_somebody_else", sources=[])
    assert original == ["rwkv7_l2wrap_bf16_v2", "wkv_of_somebody_else"]


def test_undo_puts_the_original_back(original: list[str]) -> None:
    before = cpp_extension.load
    interception = intercept()
    assert cpp_extension.load is not before
    interception.undo()
    interception.undo()
    assert cpp_extension.load is before


def test_the_outermost_of_two_interceptions_puts_the_original_back(original: list[str]) -> None:
    before = cpp_extension.load
    with intercept():
        inside = cpp_extension.load
        with intercept():
            assert cpp_extension.load is inside
        assert cpp_extension.load is inside
    assert cpp_extension.load is before


def test_what_we_have_no_kernel_for_is_declared_and_refuses(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load(name="wkv_cuda", sources=[], is_python_module=False)
    x = torch.zeros(3, 3)
    with pytest.raises(RwkvJitError, match=r"rwkv\.gemm_fp16_cublas is not an operator"):
        torch.ops.rwkv.gemm_fp16_cublas(x, x, x)


@pytest.mark.parametrize(
    ("program", "change", "message"),
    [
        (
            wind_backstepping,
            {"r": torch.zeros(1, 9, 64)},
            "torch.ops.wind_backstepping.forward: r has shape [1, 9, 64], but must be [B, T, H, N]",
        ),
        (
            wind_backstepping,
            {"k": torch.zeros(1, 32, 2, 32).half()},
            "wkv7: k is float16, but must be float32; convert it, or get an operator of that dtype",
        ),
        (
            wind_backstepping,
            {"k": torch.zeros(1, 2, 32, 32)},
            "wkv7: k has T=2 in [B, T, H, N], but r has T=32",
        ),
        (
            functools.partial(
                clampw, namespace="rwkv7_state_clampw", starts=True, ends=False
            ),
            {"initial_state": torch.zeros(3, 2, 32, 32)},
            (
                "torch.ops.rwkv7_state_clampw.forward: state has shape [3, 2, 32, 32], but must be "
                "[H, N, N] or [B, H, N, N] with B=1, H=2 and N=32"
            ),
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_expected(
    load: Callable[..., Any], program: Program, change: Tensors, message: str
) -> None:
    for name in ("wind_backstepping", "rwkv7_state_clampw"):
        load(name=name, sources=[])
    x = dict.fromkeys("rwkvab", torch.zeros(1, 32, 2, 32))
    with pytest.raises(ArgumentError) as caught:
        program({**x, "initial_state": ONE_STATE, **change}, {"y": x["r"]})
    assert str(caught.value) == message


def test_a_buffer_without_room_for_the_initial_state_is_refused(load: Callable[..., Any]) -> None:
    load(name="rwkv7_state_clampw", sources=[])
    x = {**dict.fromkeys("rwkvab", torch.zeros(1, 9, 2, 32)), "initial_state": ONE_STATE}
    program = PROGRAMS["rwkv7_state_clampw", ""]
    with pytest.raises(ArgumentError, match=r"s has shape \[1, 2, 0, 32, 32\], but must be"):
        program(x, {"y": x["r"]})


def test_sizes_that_do_not_fit_the_tensors_are_refused(load: Callable[..., Any]) -> None:
    forward = load(name="wkv6", sources=[]).forward
    x, u = torch.zeros(1, 5, 64), torch.zeros(2, 32)
    for sizes, message in (
        ((1, 5, 64, 3), "C=64 must be a multiple of H=3, the number of heads"),
        ((1, 6, 64, 2), r"r has shape \[1, 5, 64\], but must hold \[1, 6, 2, 32\]"),
    ):
        with pytest.raises(ArgumentError, match=message):
            forward(*sizes, x, x, x, x, u, x.clone())
    with pytest.raises(ArgumentError, match="the buffer for y has shape"):
        forward(1, 5, 64, 2, x, x, x, x, u, x[:, :4].clone())
