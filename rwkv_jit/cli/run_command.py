"""The command `rwkv-jit run`: a program of others, with our operators where it builds its own."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RwkvJitError

# What follows the program's name is the program's, options included.
PASSES_ARGUMENTS_ON: dict[str, Any] = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}


def run_program(
    program: Annotated[
        str, typer.Argument(help="A Python file, or with -m a module.", metavar="PROGRAM")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on to it.", metavar="ARGUMENTS")
    ] = None,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="PROGRAM is the name of a module.")
    ] = False,
) -> None:
    """Run a Python program as `python PROGRAM` would, but with the operators of rwkv_jit where it
    builds RWKV kernels by `torch.utils.cpp_extension.load`.

    What is replaced is said on standard error. The exit code is that of the program.
    """
    from ..compat.intercept import intercept  # noqa: PLC0415

    if not module and not Path(program).is_file():
        raise typer.BadParameter(f"{program} is not a file", param_hint="PROGRAM")
    sys.argv = [program, *(arguments or ())]
    sys.path[0] = "" if module else str(Path(program).resolve().parent)
    with intercept():
        try:
            if module:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(program, run_name="__main__")
        except RwkvJitError:
            # Elsewhere our errors are shown without it; here it says where the program called us.
            traceback.print_exc()
            raise typer.Exit(1) from None
