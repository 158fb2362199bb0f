"""The commands of `rwkv-jit` that look at operators, kernels and the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..config import ENTRIES
from ..errors import CacheError
from ..settings import current_settings
from .options import JsonOption, OpsArgument

_LOG_TAIL_LINES = 15


def list_operators(ops: OpsArgument = None, as_json: JsonOption = False) -> None:
    """Show operators: formula, tensors, and what can be chosen on which platform."""
    from ..ops import SPECS, get_spec  # noqa: PLC0415
    from .describe import operator_data  # noqa: PLC0415
    from .output import print_json, print_view  # noqa: PLC0415
    from .tables import operator_view  # noqa: PLC0415

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
            help=f"One of {', '.join(ENTRIES)}. Default: the one that is called.", metavar="NAME"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the source of a kernel. Needs no compiler and no GPU."""
    from ..ops import get_spec  # noqa: PLC0415
    from ..render import render  # noqa: PLC0415
    from .describe import parse_kernel  # noqa: PLC0415
    from .output import print_json  # noqa: PLC0415

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
    from .output import print_json, print_view  # noqa: PLC0415
    from .tables import entry_view  # noqa: PLC0415

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
    from .output import print_json, print_view  # noqa: PLC0415
    from .tables import explanation_view  # noqa: PLC0415

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
    from .output import print_json, print_view  # noqa: PLC0415
    from .tables import checks_view  # noqa: PLC0415

    checks = list(examine(build=build))
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        print_view(checks_view(checks))
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
