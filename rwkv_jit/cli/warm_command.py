"""The command `rwkv-jit warm`."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..arch import parse_arch
from ..config import CHECKPOINT_DTYPES, DECAYS, DTYPES, ENTRIES, STATE_LAYOUTS
from ..settings import current_settings
from .options import (
    ArchOption,
    DecayOption,
    DtypeOption,
    EntryOption,
    FromOption,
    HeadSizeOption,
    JobsOption,
    JsonOption,
    LowerBoundOption,
    OpsArgument,
    PrecisionOption,
    one_of,
    split_list,
    whole_number,
)

if TYPE_CHECKING:
    from ..render import RenderedSource
    from .warming import Outcome

_LEVELS_WITH_PROGRESS = ("debug", "info")


def warm(
    ops: OpsArgument = None,
    head_size: HeadSizeOption = "64",
    dtype: DtypeOption = "",
    arch: ArchOption = "",
    chunk_length: Annotated[
        str, typer.Option(help="Tokens between two saved states.", metavar="LIST")
    ] = "16",
    decay: DecayOption = "loglog",
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
    ] = "auto",
    precision: PrecisionOption = "float32",
    lower_bound: LowerBoundOption = None,
    entry: EntryOption = "",
    jobs: JobsOption = None,
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
    from .output import print_json, print_view  # noqa: PLC0415
    from .planning import Choices, default_archs, plan, plan_from  # noqa: PLC0415
    from .tables import failures_text, outcome_data, outcomes_table  # noqa: PLC0415
    from .warming import look_up  # noqa: PLC0415

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
        precision=precision,
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


def _warm(sources: Sequence[RenderedSource], *, force: bool, jobs: int | None) -> list[Outcome]:
    """Build, with a progress bar on a terminal; else each slow build says so in lines."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn  # noqa: PLC0415

    from .output import make_console  # noqa: PLC0415
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
