"""The commands `rwkv-jit cache ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..settings import current_settings, parse_size
from .options import JsonOption

cache_app = typer.Typer(
    no_args_is_help=True, help="Look at the cache of kernels, check it, trim it or empty it."
)

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be done; change nothing.")
]


@cache_app.command("path")
def cache_path(as_json: JsonOption = False) -> None:
    """Print the folder of the cache."""
    from ..cache import Cache  # noqa: PLC0415
    from .output import print_json  # noqa: PLC0415

    root = Cache.open(current_settings()).root
    if as_json:
        print_json({"path": str(root)})
    else:
        typer.echo(root)


@cache_app.command("ls")
def cache_ls(as_json: JsonOption = False) -> None:
    """List the kernels of the cache."""
    from ..cache import Cache  # noqa: PLC0415
    from .describe import entry_data  # noqa: PLC0415
    from .output import count_of, print_json, print_view, show_bytes  # noqa: PLC0415
    from .tables import entries_table  # noqa: PLC0415

    cache = Cache.open(current_settings())
    entries = [entry_data(entry) for entry in cache.entries()]
    entries.sort(key=lambda data: (data["kernel"], data["created"]))
    total = cache.total_bytes()
    if as_json:
        print_json({"path": str(cache.root), "bytes": total, "entries": entries})
        return
    if entries:
        print_view(entries_table(entries))
    typer.echo(f"{count_of(len(entries), 'kernel')}, {show_bytes(total)} in {cache.root}")


@cache_app.command("info")
def cache_info(dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:  # noqa: ARG001
    """Show where the cache is, what it holds, and what would be removed first.

    Changes nothing, with or without --dry-run.
    """
    from ..cache import Cache  # noqa: PLC0415
    from .output import count_of, print_json, show_bytes  # noqa: PLC0415

    cache = Cache.open(current_settings())
    info = cache.info()
    if as_json:
        print_json({name: str(v) if isinstance(v, Path) else v for name, v in info.items()})
        return
    limit = show_bytes(cache.max_bytes) if cache.max_bytes else "no limit"
    typer.echo(f"{cache.root}: {show_bytes(cache.total_bytes())} of {limit}")
    typer.echo(f"{count_of(info['entries'], 'kernel')}, {info['in_use']} in use")
    for name, noun in (
        ("quarantined", "quarantined entry"),
        ("failed_logs", "log of a failed build"),
        ("staging", "build under way"),
        ("abandoned", "build that a dead process left"),
    ):
        typer.echo(f"{info[name]} x {noun}")
    typer.echo(f"build locks: {info['locks']}")
    if info["problem"]:
        typer.echo(f"problem: {info['problem']}")


@cache_app.command("verify")
def cache_verify(dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """Compare every kernel with what its manifest promises, and move bad ones to quarantine.

    Exit code 1 if there was one. Nothing is loaded.
    """
    from ..cache import Cache  # noqa: PLC0415
    from .output import count_of, print_json  # noqa: PLC0415

    cache = Cache.open(current_settings())
    number = len(cache.entries())
    bad = cache.verify(dry_run=dry_run)
    if as_json:
        items = [{"path": str(path), "reason": reason} for path, reason in bad]
        print_json({"dry_run": dry_run, "path": str(cache.root), "bad": items})
    else:
        for path, reason in bad:
            typer.echo(f"{path}  {reason}")
        typer.echo(f"{count_of(number, 'kernel')} checked, {len(bad)} bad, in {cache.root}")
    if bad:
        raise typer.Exit(1)


@cache_app.command("trim")
def cache_trim(
    max_bytes: Annotated[
        str,
        typer.Option(
            help="What may stay, as 500M. Default: RWKV_JIT_CACHE_MAX_BYTES, else 2G.",
            metavar="SIZE",
        ),
    ] = "",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what was not used for longest until the cache is small enough.

    First goes what dead processes left, then quarantined entries and logs of failed builds, then
    kernels. Kernels that a process uses stay.
    """
    from ..cache import Cache  # noqa: PLC0415

    cache = Cache.open(current_settings())
    size = parse_size(max_bytes) if max_bytes else cache.max_bytes
    if size is None:
        problem = f"{max_bytes!r} is not a size such as 500M"
        raise typer.BadParameter(problem, param_hint="--max-bytes")
    unlimited = not max_bytes and size == 0
    removed = cache.trim(sys.maxsize if unlimited else size, dry_run=dry_run)
    _report(removed, cache.root, dry_run=dry_run, as_json=as_json)


@cache_app.command("clear")
def cache_clear(
    dry_run: DryRunOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove every kernel and every log of the cache, but for kernels that a process uses.

    Asks first on a terminal, unless --yes or --json is given. Elsewhere it does not ask: what is
    removed can be built again.
    """
    from ..cache import Cache  # noqa: PLC0415
    from .output import count_of, show_bytes  # noqa: PLC0415

    cache = Cache.open(current_settings())
    found = cache.clear(dry_run=True)
    what = f"{count_of(len(found), 'item')}, {show_bytes(sum(size for _, size in found))}"
    ask = not (yes or as_json or dry_run) and sys.stdin.isatty() and bool(found)
    if ask and not typer.confirm(f"Remove {what}, from {cache.root}?", err=True):
        raise typer.Exit(1)
    removed = found if dry_run else cache.clear(dry_run=False)
    _report(removed, cache.root, dry_run=dry_run, as_json=as_json)


def _report(
    removed: Sequence[tuple[Path, int]], root: Path, *, dry_run: bool, as_json: bool
) -> None:
    from .output import count_of, print_json, show_bytes  # noqa: PLC0415

    if as_json:
        items = [{"path": str(path), "bytes": size} for path, size in removed]
        print_json({"dry_run": dry_run, "removed": items})
        return
    if dry_run:
        for path, size in removed:
            typer.echo(f"{path}  {show_bytes(size)}")
    what = f"{count_of(len(removed), 'item')}, {show_bytes(sum(size for _, size in removed))}"
    typer.echo(f"{'would remove' if dry_run else 'removed'} {what}, from {root}")
