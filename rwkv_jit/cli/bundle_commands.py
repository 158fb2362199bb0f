"""The commands `rwkv-jit bundle ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BundleError
from ..settings import current_settings
from .bundle_build import ForceOption, bundle_build, report_bundle
from .options import JsonOption

if TYPE_CHECKING:
    from ..bundle import Bundle

bundle_app = typer.Typer(
    no_args_is_help=True, help="Prebuilt kernels: make, check, look at and install bundles of them."
)

BundleArgument = Annotated[
    Path, typer.Argument(help="The folder of a bundle.", metavar="BUNDLE", show_default=False)
]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--key",
        help="File of a public key that it must be signed with; may be given again. Default: "
        "RWKV_JIT_BUNDLE_KEYS.",
        metavar="FILE",
    ),
]

bundle_app.command("build")(bundle_build)


@bundle_app.command("verify")
def bundle_verify(
    bundle: BundleArgument, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Compare every file of a bundle with its index, and check its signature if a key is given.

    Exit code 1 if anything is wrong.
    """
    from ..bundle import verify_bundle  # noqa: PLC0415
    from .output import print_json  # noqa: PLC0415

    try:
        opened = _open(bundle, key)
        problems = verify_bundle(opened)
    except BundleError as error:
        problems = [str(error)]
    if as_json:
        signed = None if problems or opened.signed_by is None else str(opened.signed_by)
        print_json({"path": str(bundle), "problems": problems, "signed_by": signed})
    elif not problems:
        report_bundle("verified", opened, as_json=False)
    for problem in () if as_json else problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@bundle_app.command("inspect")
def bundle_inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """List the kernels of a bundle. None of their files is read."""
    from ..bundle import open_bundle  # noqa: PLC0415
    from .describe import bundle_data, bundled_data  # noqa: PLC0415
    from .output import count_of, print_json, print_view, show_bytes  # noqa: PLC0415
    from .tables import bundled_table  # noqa: PLC0415

    opened = open_bundle(bundle, guarded=False)
    data, rows = bundle_data(opened), bundled_data(opened)
    if as_json:
        print_json({**data, "entries": rows})
        return
    print_view(bundled_table(rows))
    total = show_bytes(sum(row["bytes"] for row in rows))
    typer.echo(
        f"{count_of(len(rows), 'kernel')}, {total}, made by rwkv_jit {data['made_by']}, "
        f"{'signed' if data['signed'] else 'not signed'}"
    )


@bundle_app.command("install")
def bundle_install(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, as a folder or a tar archive.", metavar="BUNDLE")
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            help="The folder to make. Default: one of this user's, where bundles are found without "
            "RWKV_JIT_BUNDLE_PATH.",
            metavar="FOLDER",
        ),
    ] = None,
    key: KeyOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle and copy it, or unpack its archive, to where it will be used."""
    from ..bundle import install_folder  # noqa: PLC0415
    from ..bundle.archive import copy_bundle, unpack_archive  # noqa: PLC0415

    keys = tuple(key or current_settings().bundle_keys)
    target = to
    if target is None:
        name = bundle.absolute().name.removesuffix(".tar").lstrip(".")
        target = install_folder(current_settings()) / name
    if bundle.is_dir():
        made = copy_bundle(_open(bundle, key), target, replace=force)
    else:
        made = unpack_archive(bundle, target, keys=keys, replace=force)
    report_bundle("installed", made, as_json)
    if to is not None and not as_json:
        typer.echo(f"use it with: RWKV_JIT_BUNDLE_PATH={made.root}")


@bundle_app.command("wheel")
def bundle_wheel(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Argument(help="The folder for the wheel.", metavar="FOLDER")],
    name: Annotated[
        str, typer.Option(help="Of the package.", metavar="PACKAGE")
    ] = "rwkv-jit-kernels",
    version: Annotated[str, typer.Option(help="Of the package.", metavar="NUMBER")] = "0",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a Python package of a bundle, whose kernels are found once pip has installed it."""
    from ..bundle import verify_bundle  # noqa: PLC0415
    from ..bundle.wheel import write_wheel  # noqa: PLC0415
    from .output import print_json  # noqa: PLC0415

    opened = _open(bundle, key)
    problems = verify_bundle(opened)
    if problems:
        raise BundleError(problems[0])
    wheel = write_wheel(opened, out, name=name, version=version)
    if as_json:
        print_json({"wheel": str(wheel), "digest": opened.index.digest})
    else:
        typer.echo(wheel)


@bundle_app.command("sign")
def bundle_sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Argument(help="File of a private key.", metavar="KEY")],
    as_json: JsonOption = False,
) -> None:
    """Check a bundle and sign it, in the place of a signature that it has."""
    from ..bundle import open_bundle, verify_bundle  # noqa: PLC0415
    from ..bundle.make import sign_bundle  # noqa: PLC0415

    opened = open_bundle(bundle)
    problems = verify_bundle(opened)
    if problems:
        raise BundleError(problems[0])
    sign_bundle(opened, key)
    report_bundle("signed", opened, as_json)


@bundle_app.command("keygen")
def bundle_keygen(
    path: Annotated[
        Path, typer.Argument(help="The file of the private key to make.", metavar="FILE")
    ],
    as_json: JsonOption = False,
) -> None:
    """Make a pair of keys: a private one to sign bundles with, and, in FILE.pub, the public one."""
    from ..bundle.sign import generate_key  # noqa: PLC0415
    from .output import print_json  # noqa: PLC0415

    public = generate_key(path)
    if as_json:
        print_json({"private": str(path), "public": str(public)})
    else:
        typer.echo(f"private key: {path} (keep it secret)\npublic key:  {public}")


def _open(bundle: Path, key: list[Path] | None) -> Bundle:
    from ..bundle import open_bundle  # noqa: PLC0415

    settings = current_settings()
    keys = tuple(key or settings.bundle_keys)
    return open_bundle(bundle, keys=keys, guarded=not settings.allow_shared_cache)
