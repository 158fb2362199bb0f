"""The commands of `rwkv-jit`, but for those of its cache."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..arch import parse_arch
from ..config import CHECKPOINT_DTYPES, DECAYS, DTYPES, ENTRIES, STATE_LAYOUTS
from ..errors import CacheError, ConfigError
from ..settings import current_settings

if TYPE_CHECKING:
    from ..render import RenderedSource
    from .warming import Outcome

_Value = TypeVar("_Value")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
OpsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="OP", help="Operators; all if none is named.")
]

FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="The kernels that rwkv_jit.used_configs(FILE) wrote, and no others; with --arch, for "
        "these architectures.",
        metavar="FILE",
    ),
]

LowerBoundOption = Annotated[
    float | None,
    typer.Option(
        help="What log d is at least, for every token; from -8 on tensor-core kernels are faster.",
        metavar="LOG_D",
    ),
]

_LOG_TAIL_LINES = 15
_LEVELS_WITH_PROGRESS = ("debug", "info")


def warm(
    ops: OpsArgument = None,
    head_size: Annotated[str, typer.Option(help="Head sizes, as 64,128.", metavar="LIST")] = "64",
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(DTYPES)}. Default: bf16 for CUDA, fp32 for a CPU.", metavar="LIST"
        ),
    ] = "",
    arch: Annotated[
        str,
        typer.Option(
            help="As 8.0,9.0a or cpu. Default: RWKV_JIT_CUDA_ARCH_LIST, else TORCH_CUDA_ARCH_LIST, "
            "else the GPUs at hand, else this CPU.",
            metavar="LIST",
        ),
    ] = "",
    chunk_length: Annotated[
        str, typer.Option(help="Tokens between two saved states.", metavar="LIST")
    ] = "16",
    decay: Annotated[
        str, typer.Option(help=f"What w means, of {', '.join(DECAYS)}.", metavar="LIST")
    ] = "loglog",
    state_dtype: Annotated[
        str,
        typer.Option(help="Of the states. Default: fp32, and fp64 for fp64.", metavar="LIST"),
    ] = "",
    state_layout: Annotated[
        str, typer.Option(help=f"Of {', '.join(STATE_LAYOUTS)}.", metavar="LIST")
    ] = "vk",
    checkpoint_dtype: Annotated[
        str,
        typer.Option(
            help=f"Of the states kept for the backward, of {', '.join(CHECKPOINT_DTYPES)}.",
            metavar="LIST",
        ),
    ] = "accumulator",
    lower_bound: LowerBoundOption = None,
    entry: Annotated[
        str, typer.Option(help=f"Of {', '.join(ENTRIES)}. Default: all.", metavar="LIST")
    ] = "",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most compilers at once. Default: MAX_JOBS, else what cores and memory allow.",
        ),
    ] = None,
    from_file: FromOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what exists and what would be built.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build what exists, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build kernels ahead of time, so that no program waits for a compiler later.

    A LIST is separated by commas, and every combination is built. One that a named operator has no
    kernel for is an error, before anything is built. A GPU of the architecture is not needed. What
    a bundle has is not built.
    """
    from .tables import (  # noqa: PLC0415
        failures_text,
        outcome_data,
        outcomes_table,
        print_json,
        print_view,
    )
    from .warming import Choices, default_archs, look_up, plan, plan_from  # noqa: PLC0415

    settings = current_settings()
    archs = split_list(arch, "--arch", parse_arch)
    if from_file is not None and ops:
        raise typer.BadParameter("the file names the operators", param_hint="--from")
    choices = Choices(
        ops=tuple(dict.fromkeys(ops or ())),
        head_sizes=split_list(head_size, "--head-size", whole_number),
        dtypes=split_list(dtype, "--dtype", one_of(DTYPES)),
        archs=archs or (() if from_file else default_archs(settings)),
        chunk_lengths=split_list(chunk_length, "--chunk-length", whole_number),
        decays=split_list(decay, "--decay", one_of(DECAYS)),
        state_dtypes=split_list(state_dtype, "--state-dtype", one_of(DTYPES)),
        state_layouts=split_list(state_layout, "--state-layout", one_of(STATE_LAYOUTS)),
        checkpoint_dtypes=split_list(
            checkpoint_dtype, "--checkpoint-dtype", one_of(CHECKPOINT_DTYPES)
        ),
        lower_bound=lower_bound,
        entries=split_list(entry, "--entry", one_of(ENTRIES)),
    )
    sources = plan(choices) if from_file is None else plan_from(from_file, archs)
    if dry_run:
        outcomes = look_up(sources, settings)
        if force:
            outcomes = [dataclasses.replace(outcome, status="missing") for outcome in outcomes]
    else:
        outcomes = _warm(sources, force=force, jobs=jobs)
    if as_json:
        print_json([outcome_data(outcome) for outcome in outcomes])
    else:
        print_view(outcomes_table(outcomes))
        counts = Counter(outcome.status for outcome in outcomes)
        print_view(", ".join(f"{number} {status}" for status, number in counts.items()))
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failures:
        typer.echo(failures_text(failures), err=True)
        raise typer.Exit(1)


def list_operators(ops: OpsArgument = None, as_json: JsonOption = False) -> None:
    """Show operators: formula, tensors, and what can be chosen on which platform."""
    from ..ops import SPECS, get_spec  # noqa: PLC0415
    from .describe import operator_data  # noqa: PLC0415
    from .tables import operator_view, print_json, print_view  # noqa: PLC0415

    operators = [operator_data(get_spec(name)) for name in ops or SPECS]
    if as_json:
        print_json(operators)
        return
    for operator in operators:
        print_view(operator_view(operator))


def render_source(
    slug: Annotated[str, typer.Argument(help="As wkv7_n64_bf16_l16_sm90a.", metavar="SLUG")],
    entry: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(ENTRIES)}. Default: the one that is called.", metavar="ENTRY"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the source of a kernel. Needs no compiler and no GPU."""
    from ..ops import get_spec  # noqa: PLC0415
    from ..render import render  # noqa: PLC0415
    from .describe import parse_kernel  # noqa: PLC0415
    from .tables import print_json  # noqa: PLC0415

    config, named = parse_kernel(slug)
    spec = get_spec(config.op)
    wanted = named or (next(iter(spec.entries)) if entry is None else entry)
    if wanted not in spec.entries:
        problem = f"{wanted!r} is not one of {', '.join(spec.entries)}"
        raise typer.BadParameter(problem, param_hint="--entry")
    source = render(spec, config, wanted)
    if as_json:
        print_json({"kernel": source.identity, "suffix": source.suffix, "source": source.text})
    else:
        typer.echo(source.text, nl=False)


def show(
    kernel: Annotated[
        str,
        typer.Argument(
            help="A slug, slug.forward, or the beginning of a digest.", metavar="SLUG|DIGEST"
        ),
    ],
    log: Annotated[bool, typer.Option("--log", help="Print the whole log, nothing else.")] = False,
    source: Annotated[
        bool, typer.Option("--source", help="Print the source that was built, nothing else.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a kernel of the cache: how it was built, what it needs, the end of its log."""
    from ..cache import Cache  # noqa: PLC0415
    from .describe import entry_data, find_entries  # noqa: PLC0415
    from .tables import entry_view, print_json, print_view  # noqa: PLC0415

    found = find_entries(kernel, Cache.open(current_settings()).entries())
    asked = [name for name, wanted in (("log", log), ("source", source)) if wanted]
    texts = [{"log": _read(entry.log), "source": _read(entry.source)} for entry in found]
    if as_json:
        print_json(
            [
                {**entry_data(entry), **{f"{name}_text": text[name] for name in asked}}
                for entry, text in zip(found, texts, strict=True)
            ]
        )
        return
    for entry, text in zip(found, texts, strict=True):
        if not asked:
            tail = "\n".join(text["log"].splitlines()[-_LOG_TAIL_LINES:])
            print_view(entry_view(entry_data(entry), tail))
        for name in asked:
            if len(found) * len(asked) > 1:
                typer.echo(f"==> {name} of {entry.manifest.identity} <==")
            typer.echo(text[name])


def explain(
    kernel: Annotated[str, typer.Argument(help="A slug, or slug.forward.", metavar="SLUG[.ENTRY]")],
    as_json: JsonOption = False,
) -> None:
    """Say where a kernel comes from: a bundle, the cache or a build; and, for each that does not
    have it, how the nearest that it has differs. Builds nothing.

    Exit code 1 if nothing answers for one of the entries.
    """
    from ..ops import get_spec  # noqa: PLC0415
    from ..render import render  # noqa: PLC0415
    from .describe import parse_kernel  # noqa: PLC0415
    from .explain import explain as explain_source  # noqa: PLC0415
    from .tables import explanation_view, print_json, print_view  # noqa: PLC0415

    config, named = parse_kernel(kernel)
    spec = get_spec(config.op)
    explanations = [
        explain_source(render(spec, config, entry), current_settings())
        for entry in ([named] if named else spec.entries)
    ]
    if as_json:
        print_json([dataclasses.asdict(explanation) for explanation in explanations])
    else:
        for explanation in explanations:
            print_view(explanation_view(explanation))
    if any(explanation.answer == "nothing" for explanation in explanations):
        raise typer.Exit(1)


def doctor(
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Also build, load and run a small kernel, and check its results."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, and say what would help.

    Exit code 1 if the device at hand, the GPU or else the CPU, cannot build or run kernels.
    """
    from .doctor import examine  # noqa: PLC0415
    from .tables import checks_view, print_json, print_view  # noqa: PLC0415

    checks = list(examine(build=build))
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        print_view(checks_view(checks))
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


def _warm(sources: Sequence[RenderedSource], *, force: bool, jobs: int | None) -> list[Outcome]:
    """Build, with a progress bar on a terminal; else each slow build says so in lines."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn  # noqa: PLC0415

    from .tables import make_console  # noqa: PLC0415
    from .warming import warm as warm_all  # noqa: PLC0415

    settings = current_settings()
    shown = settings.log_level in _LEVELS_WITH_PROGRESS and sys.stderr.isatty()
    if shown:
        # The bar stands for the lines of builds, but not for a wait, whose line goes above it.
        settings = dataclasses.replace(settings, log_level="warning")
    columns = ("building", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=len(sources))
        return warm_all(
            sources, settings, force=force, jobs=jobs, on_result=lambda: progress.advance(task)
        )


def split_list(text: str, option: str, convert: Callable[[str], _Value]) -> tuple[_Value, ...]:
    """The values of a comma-separated list, each once. ValueErrors of `convert` end the program as
    wrong usage; ConfigErrors pass."""
    try:
        values = [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ConfigError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    return tuple(dict.fromkeys(values))


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A conversion for `split_list`: a value that must be one of these."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check


def whole_number(text: str) -> int:
    """A conversion for `split_list`: digits only."""
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
