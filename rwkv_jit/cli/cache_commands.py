"""The commands `rwkv-jit cache ...`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..settings import current_settings
from .commands import JsonOption

cache_app = typer.Typer(no_args_is_help=True, help="Look at the cache of kernels, or empty it.")


@cache_app.command("path")
def cache_path(as_json: JsonOption = False) -> None:
    """Print the folder of the cache."""
    from ..cache import Cache  # noqa: PLC0415
    from .tables import print_json  # noqa: PLC0415

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
    from .tables import count_of, entries_table, print_json, print_view, show_bytes  # noqa: PLC0415

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


@cache_app.command("clear")
def cache_clear(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove every kernel and every log of the cache.

    Asks first on a terminal, unless --yes or --json is given. Elsewhere it does not ask: what is
    removed can be built again.
    """
    from ..cache import Cache  # noqa: PLC0415
    from .tables import count_of, print_json, show_bytes  # noqa: PLC0415

    cache = Cache.open(current_settings())
    found = cache.clear(dry_run=True)
    what = f"{count_of(len(found), 'item')}, {show_bytes(sum(size for _, size in found))}"
    ask = not (yes or as_json or dry_run) and sys.stdin.isatty() and bool(found)
    if ask and not typer.confirm(f"Remove {what}, from {cache.root}?", err=True):
        raise typer.Exit(1)
    removed = found if dry_run else cache.clear(dry_run=False)
    if as_json:
        items = [{"path": str(path), "bytes": size} for path, size in removed]
        print_json({"dry_run": dry_run, "removed": items})
        return
    if dry_run:
        for path, size in removed:
            typer.echo(f"{path}  {show_bytes(size)}")
    typer.echo(f"{'would remove' if dry_run else 'removed'} {what}, from {cache.root}")
