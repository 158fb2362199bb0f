"""The program `rwkv-jit`: build kernels ahead of time, and look at operators, cache and machine."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .arch import parse_arch
from .cli_cache import cache_app
from .config import DECAYS, DTYPES, ENTRIES, STATE_LAYOUTS
from .errors import CacheError, RwkvJitError
from .options import JsonOption, OpsArgument, one_of, split_list, whole_number
from .settings import current_settings

if TYPE_CHECKING:
    from .render import RenderedSource
    from .warming import Outcome

_LOG_TAIL_LINES = 15
_LEVELS_WITH_PROGRESS = ("debug", "info")


class _Group(TyperGroup):
    """Ends the program with a message, and no traceback, for errors that a user can mend."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RwkvJitError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Kernels of the RWKV operators: build them ahead of time, look at them, check the machine."
    "\n\nEvery command takes --json, and then prints JSON alone on standard output. Exit codes: "
    "0 done, 1 failed, 2 wrong usage, 130 interrupted.",
)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """The entry point of the program."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    app(prog_name="rwkv-jit")


@app.callback(invoke_without_command=True)
def _program(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"rwkv-jit {__version__}")
        raise typer.Exit


@app.command()
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what exists and what would be built.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build what exists, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build kernels ahead of time, so that no program waits for a compiler later.

    A LIST is separated by commas, and every combination is built. One that a named operator has no
    kernel for is an error, before anything is built. A GPU of the architecture is not needed.
    """
    from .tables import (  # noqa: PLC0415
        failures_text,
        outcome_data,
        outcomes_table,
        print_json,
        print_view,
    )
    from .warming import Choices, default_archs, look_up, plan  # noqa: PLC0415

    settings = current_settings()
    archs = split_list(arch, "--arch", parse_arch)
    choices = Choices(
        ops=tuple(dict.fromkeys(ops or ())),
        head_sizes=split_list(head_size, "--head-size", whole_number),
        dtypes=split_list(dtype, "--dtype", one_of(DTYPES)),
        archs=archs or default_archs(settings),
        chunk_lengths=split_list(chunk_length, "--chunk-length", whole_number),
        decays=split_list(decay, "--decay", one_of(DECAYS)),
        state_dtypes=split_list(state_dtype, "--state-dtype", one_of(DTYPES)),
        state_layouts=split_list(state_layout, "--state-layout", one_of(STATE_LAYOUTS)),
        entries=split_list(entry, "--entry", one_of(ENTRIES)),
    )
    sources = plan(choices)
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


@app.command("list")
def list_operators(ops: OpsArgument = None, as_json: JsonOption = False) -> None:
    """Show operators: formula, tensors, and what can be chosen on which platform."""
    from .describe import operator_data  # noqa: PLC0415
    from .ops import SPECS, get_spec  # noqa: PLC0415
    from .tables import operator_view, print_json, print_view  # noqa: PLC0415

    operators = [operator_data(get_spec(name)) for name in ops or SPECS]
    if as_json:
        print_json(operators)
        return
    for operator in operators:
        print_view(operator_view(operator))


@app.command("render")
def render_source(
    slug: Annotated[str, typer.Argument(help="As wkv7_n64_bf16_l16_sm90a.", metavar="SLUG")],
    entry: Annotated[
        str, typer.Option(help=f"One of {', '.join(ENTRIES)}.", metavar="ENTRY")
    ] = "forward",
    as_json: JsonOption = False,
) -> None:
    """Print the source of a kernel. Needs no compiler and no GPU."""
    from .describe import parse_kernel  # noqa: PLC0415
    from .ops import get_spec  # noqa: PLC0415
    from .render import render  # noqa: PLC0415
    from .tables import print_json  # noqa: PLC0415

    config, named = parse_kernel(slug)
    wanted = named or entry
    if wanted not in ENTRIES:
        problem = f"{wanted!r} is not one of {', '.join(ENTRIES)}"
        raise typer.BadParameter(problem, param_hint="--entry")
    source = render(get_spec(config.op), config, wanted)
    if as_json:
        print_json({"kernel": source.identity, "suffix": source.suffix, "source": source.text})
    else:
        typer.echo(source.text, nl=False)


@app.command()
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
    from .cache import Cache  # noqa: PLC0415
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


@app.command()
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
        settings = dataclasses.replace(settings, log_level="quiet")
    columns = ("building", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=len(sources))
        return warm_all(
            sources, settings, force=force, jobs=jobs, on_result=lambda: progress.advance(task)
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
