"""The command `rwkv-jit bench`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.cases import Case, Shape, default_corner, default_dtypes, default_shapes, sweep
from ..config import DTYPES, PRECISIONS, is_bounded
from ..errors import ConfigError
from ..ops import SPECS, get_spec
from ..settings import current_settings
from ..spec import OpSpec
from .options import JsonOption, LowerBoundOption, PrecisionOption, one_of, split_list

if TYPE_CHECKING:
    from ..bench.contenders import Absentee, Contender

_DEVICES = ("cpu", "cuda")
_SUFFIXES = (".png", ".svg")
_MOST_COPYING_SECONDS = 0.3


def bench(
    op: Annotated[str, typer.Option(help="Operators. Default: all.", metavar="LIST")] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of the tokens; may be given again.", metavar="B,T,H,N"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(DTYPES)}. Default: bf16,fp32 on a GPU, fp32 on a CPU.",
            metavar="LIST",
        ),
    ] = "",
    precision: PrecisionOption = "float32",
    lower_bound: LowerBoundOption = None,
    state_dtype: Annotated[
        str,
        typer.Option(help="Of the states of serving operators. Default: float32.", metavar="DTYPE"),
    ] = "",
    device: Annotated[
        str, typer.Option(help=f"One of {', '.join(_DEVICES)}. Default: a GPU if there is one.")
    ] = "",
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Measure the peers that are installed, too: fla, rwkv7-hf."),
    ] = False,
    rwkv_lm: Annotated[
        list[Path] | None,
        typer.Option(
            "--rwkv-lm",
            help="A peer of your own, such as a kernel of RWKV-LM: a Python file that defines "
            "`call(r, w, k, v, a, b) -> y`, which is differentiable, and `decay`, what w means to "
            "it (loglog, logit or log); `op`, where it is not wkv7. The file is run. May be given "
            "again.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw times against T and against B * H into this file (.png or .svg). The sizes "
            "rise to those of --shape by doubling. Needs matplotlib (the extra `bench`).",
            metavar="FILE",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time for each measurement; five runs at least.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure operators: accuracy, then times of forward and of forward and backward.

    Nothing is timed that is not within the accuracy limits of its dtype, against the recurrence in
    float64 on a small slice. Times are medians, with quartiles; the floor is the time in which a
    copy, measured in the same run, moves the fewest bytes of the operator. On a CPU a plain PyTorch
    loop over tokens in float32 runs beside.

    Of a serving operator (wkv7_decode and the like) y and the states are looked at, and a step is
    timed, on a GPU inside a CUDA graph of many. Prefill of several sequences is measured twice: of
    one length, and packed, of lengths from 17 to more than twice that with as many tokens in all.

    Exit code 1 if an operator fails; what becomes of peers does not count.
    """
    ops = split_list(op, "--op", str)
    dtypes = split_list(dtype, "--dtype", one_of(DTYPES))
    shapes = _shapes(shape or (), plot)
    _check_choice(device, _DEVICES, "--device")
    _check_choice(state_dtype, DTYPES, "--state-dtype")
    _check_choice(precision, PRECISIONS, "--precision")
    if plot is not None:
        _check_plot(plot)

    from ..bench.contenders import OURS  # noqa: PLC0415
    from ..bench.machine import default_device, describe_machine  # noqa: PLC0415
    from ..bench.measure import measure_case, result_data  # noqa: PLC0415
    from ..bench.plot import check_plotting, write_plot  # noqa: PLC0415
    from ..bench.timing import copy_bandwidth  # noqa: PLC0415
    from .bench_tables import case_view, machine_text  # noqa: PLC0415
    from .output import print_json, print_view  # noqa: PLC0415

    device = device or default_device()
    corner = (shapes[0] if shapes else default_corner(device)) if plot else None
    cases = _cases(
        _sequences(ops) if plot else ops,
        sweep(corner) if corner else shapes,
        dtypes,
        state_dtype,
        precision,
        lower_bound,
        device,
    )
    line_ups = _line_ups(cases, device, known_peers=peers, peer_files=rwkv_lm or ())
    if plot is not None:
        check_plotting()
    bandwidth = copy_bandwidth(device, min(seconds, _MOST_COPYING_SECONDS))
    machine = {
        **describe_machine(device, current_settings()),
        "copy_bytes_per_second": bandwidth,
        "command": shlex.join(["rwkv-jit", *sys.argv[1:]]),
    }
    if not as_json:
        typer.echo(f"{machine_text(machine)}\n")
    results = []
    for case, contenders in line_ups:
        found = measure_case(case, contenders, device, bandwidth=bandwidth, seconds=seconds)
        results.extend(found)
        if not as_json:
            print_view(case_view(found))
    if as_json:
        print_json({**machine, "results": [result_data(result) for result in results]})
    if plot is not None and corner is not None:
        write_plot(results, corner, f"{machine['device']}, torch {machine['torch']}", plot)
    if any(result.by == OURS and result.status != "ok" for result in results):
        raise typer.Exit(1)


def _shapes(texts: Sequence[str], plot: Path | None) -> list[Shape]:
    try:
        shapes = list(dict.fromkeys(Shape.parse(text) for text in texts))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from None
    if plot is not None and len(shapes) > 1:
        raise typer.BadParameter("a plot has one largest shape", param_hint="--shape")
    return shapes


def _check_choice(value: str, choices: Sequence[str], option: str) -> None:
    if value and value not in choices:
        problem = f"{value!r} is not one of {', '.join(choices)}"
        raise typer.BadParameter(problem, param_hint=option)


def _check_plot(path: Path) -> None:
    _check_choice(path.suffix or "no suffix", _SUFFIXES, "--plot")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is not a folder", param_hint="--plot")


def _sequences(ops: Sequence[str]) -> list[str]:
    """The operators of a plot, whose axes are those of recurrences on whole sequences."""
    others = [op for op in ops if not _has_plot(_spec(op))]
    if others:
        raise typer.BadParameter(f"{others[0]} has no plot", param_hint="--plot")
    return list(ops) or [name for name, spec in SPECS.items() if _has_plot(spec)]


def _has_plot(spec: OpSpec) -> bool:
    return spec.is_recurrence and not spec.is_serving


def _spec(op: str) -> OpSpec:
    try:
        return get_spec(op)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _cases(
    ops: Sequence[str],
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    state_dtype: str,
    precision: str,
    lower_bound: float | None,
    device: str,
) -> list[Case]:
    """Every combination; of what is not named, the defaults of the device."""
    found = []
    for op in ops or SPECS:
        spec = _spec(op)
        entry = next(iter(spec.entries))
        found += [
            Case(
                op=op,
                shape=shape,
                dtype=dtype,
                state_dtype=state_dtype if spec.is_serving else "",
                precision=precision if "precision" in spec.knobs and dtype == "fp32" else "float32",
                bounded=is_bounded("bench", dtype, lower_bound),
                packed=packed,
            )
            for dtype in dtypes or default_dtypes(device)
            for shape in shapes or default_shapes(device, entry)
            for packed in ((False, True) if entry == "prefill" and shape.batch > 1 else (False,))
        ]
    return found


def _line_ups(
    cases: Sequence[Case], device: str, *, known_peers: bool, peer_files: Sequence[Path]
) -> list[tuple[Case, list[Contender | Absentee]]]:
    """What is measured in each case; what no kernel serves is wrong usage, before any of it."""
    from ..bench.contenders import line_up  # noqa: PLC0415

    try:
        return [
            (case, line_up(case, device, known_peers=known_peers, peer_files=peer_files))
            for case in cases
        ]
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
