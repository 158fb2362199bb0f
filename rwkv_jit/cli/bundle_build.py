"""The command `rwkv-jit bundle build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..arch import parse_arch
from ..config import DECAYS, DTYPES, ENTRIES
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
    PrecisionOption,
    one_of,
    split_list,
    whole_number,
)

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..render import RenderedSource

ForceOption = Annotated[
    bool, typer.Option("--force", help="Take the place of a bundle that is there.")
]


def bundle_build(
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    op: Annotated[str, typer.Option(help="Operators. Default: all.", metavar="LIST")] = "",
    head_size: HeadSizeOption = "64",
    dtype: DtypeOption = "",
    arch: ArchOption = "",
    decay: DecayOption = "loglog",
    precision: PrecisionOption = "float32",
    lower_bound: LowerBoundOption = None,
    entry: EntryOption = "",
    everything: Annotated[
        bool,
        typer.Option("--all", help="Every head size and dtype that there are kernels for."),
    ] = False,
    from_file: FromOption = None,
    jobs: JobsOption = None,
    tar: Annotated[bool, typer.Option("--tar", help="Also make OUT.tar.")] = False,
    sign: Annotated[
        Path | None,
        typer.Option(help="File of a private key to sign it with.", metavar="FILE"),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build kernels into a new bundle. Needs compilers, but no GPU, and torch may be a CPU build.

    A LIST is separated by commas, and every combination is built. What the cache has already is
    taken from there.
    """
    from ..bundle.archive import write_archive  # noqa: PLC0415
    from ..bundle.make import write_bundle  # noqa: PLC0415
    from .planning import Choices, default_archs, plan, plan_all, plan_from  # noqa: PLC0415
    from .tables import failures_text  # noqa: PLC0415
    from .warming import build_all  # noqa: PLC0415

    settings = current_settings()
    archs = split_list(arch, "--arch", parse_arch)
    ops = split_list(op, "--op", str)
    if from_file is not None:
        sources: list[RenderedSource] = plan_from(from_file, archs)
    elif everything:
        sources = plan_all(ops, archs or default_archs(settings))
    else:
        sources = plan(
            Choices(
                ops=ops,
                head_sizes=split_list(head_size, "--head-size", whole_number),
                dtypes=split_list(dtype, "--dtype", one_of(DTYPES)),
                archs=archs or default_archs(settings),
                decays=split_list(decay, "--decay", one_of(DECAYS)),
                precision=precision,
                lower_bound=lower_bound,
                entries=split_list(entry, "--entry", one_of(ENTRIES)),
            )
        )
    outcomes = build_all(sources, settings, jobs=jobs)
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failures:
        typer.echo(failures_text(failures), err=True)
        raise typer.Exit(1)
    entries = [outcome.entry for outcome in outcomes if outcome.entry is not None]
    bundle = write_bundle(entries, out, sign_with=sign, replace=force)
    if tar:
        write_archive(bundle, _archive_path(bundle))
    report_bundle("made", bundle, as_json, archive=str(_archive_path(bundle)) if tar else None)


def report_bundle(done: str, bundle: Bundle, as_json: bool, archive: str | None = None) -> None:
    """Say what was done with a bundle."""
    from .describe import bundle_data  # noqa: PLC0415
    from .output import count_of, print_json  # noqa: PLC0415

    if as_json:
        print_json({**bundle_data(bundle), "archive": archive})
        return
    typer.echo(f"{done} {bundle.root}: {count_of(len(bundle.index.entries), 'kernel')}")
    if archive is not None:
        typer.echo(f"archive: {archive}")


def _archive_path(bundle: Bundle) -> Path:
    return bundle.root.with_name(f"{bundle.root.name}.tar")
