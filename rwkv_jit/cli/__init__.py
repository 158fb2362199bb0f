"""The program `rwkv-jit`: build kernels ahead of time, and look at operators, cache and machine."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import RwkvJitError
from . import commands
from .bench_commands import bench
from .bundle_commands import bundle_app
from .cache_commands import cache_app
from .run_command import PASSES_ARGUMENTS_ON, run_program
from .warm_command import warm

__all__ = ["app", "main"]


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
    "\n\nEvery command but run takes --json, and then prints JSON alone on standard output. Exit "
    "codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
)
app.command()(warm)
app.command("list")(commands.list_operators)
app.command("render")(commands.render_source)
app.command()(commands.show)
app.command()(commands.explain)
app.command()(commands.doctor)
app.command()(bench)
app.add_typer(cache_app, name="cache")
app.add_typer(bundle_app, name="bundle")
app.command("run", context_settings=PASSES_ARGUMENTS_ON)(run_program)


def main() -> None:
    """The entry point of the program."""
    app(prog_name="rwkv-jit")


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if context.invoked_subcommand != "run":
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if version:
        typer.echo(f"rwkv-jit {__version__}")
        raise typer.Exit
