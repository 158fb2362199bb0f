"""The commands `rwkv-jit bundle ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arch import parse_arch
from ..config import DECAYS, DTYPES, ENTRIES
from ..errors import BundleError
from ..settings import current_settings
from .commands import FromOption, JsonOption, LowerBoundOption, one_of, split_list, whole_number

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..render import RenderedSource

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
ForceOption = Annotated[
    bool, typer.Option("--force", help="Take the place of a bundle that is there.")
]
SignOption = Annotated[
    Path | None,
    typer.Option("--sign", help="File of a private key to sign it with.", metavar="FILE"),
]


@bundle_app.command("build")
def bundle_build(
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
    op: Annotated[str, typer.Option(help="Operators. Default: all.", metavar="LIST")] = "",
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
            help="As 8.0,9.0a,12.0f,cpu. Default: RWKV_JIT_CUDA_ARCH_LIST, else "
            "TORCH_CUDA_ARCH_LIST, else the GPUs at hand, else this CPU.",
            metavar="LIST",
        ),
    ] = "",
    decay: Annotated[
        str, typer.Option(help=f"What w means, of {', '.join(DECAYS)}.", metavar="LIST")
    ] = "loglog",
    lower_bound: LowerBoundOption = None,
    entry: Annotated[
        str, typer.Option(help=f"Of {', '.join(ENTRIES)}. Default: all.", metavar="LIST")
    ] = "",
    everything: Annotated[
        bool,
        typer.Option("--all", help="Every head size and dtype that there are kernels for."),
    ] = False,
    from_file: FromOption = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most compilers at once. Default: MAX_JOBS, else what cores and memory allow.",
        ),
    ] = None,
    tar: Annotated[bool, typer.Option("--tar", help="Also make OUT.tar.")] = False,
    sign: SignOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build kernels into a new bundle. Needs compilers, but no GPU, and torch may be a CPU build.

    A LIST is separated by commas, and every combination is built. What the cache has already is
    taken from there.
    """
    from ..bundle.archive import write_archive  # noqa: PLC0415
    from ..bundle.make import write_bundle  # noqa: PLC0415
    from .tables import failures_text  # noqa: PLC0415
    from .warming import Choices, build_all, default_archs, plan, plan_all, plan_from  # noqa: PLC0415

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
    _report("made", bundle, as_json, archive=str(_archive_path(bundle)) if tar else None)


@bundle_app.command("verify")
def bundle_verify(
    bundle: BundleArgument, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Compare every file of a bundle with its index, and check its signature if a key is given.

    Exit code 1 if anything is wrong.
    """
    from ..bundle import verify_bundle  # noqa: PLC0415
    from .tables import print_json  # noqa: PLC0415

    try:
        opened = _open(bundle, key)
        problems = verify_bundle(opened)
    except BundleError as error:
        problems = [str(error)]
    if as_json:
        signed = None if problems or opened.signed_by is None else str(opened.signed_by)
        print_json({"path": str(bundle), "problems": problems, "signed_by": signed})
    elif not problems:
        _report("verified", opened, as_json=False)
    for problem in () if as_json else problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@bundle_app.command("inspect")
def bundle_inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """List the kernels of a bundle. None of their files is read."""
    from ..bundle import open_bundle  # noqa: PLC0415
    from .tables import count_of, make_table, print_json, print_view, show_bytes  # noqa: PLC0415

    opened = open_bundle(bundle, guarded=False)
    rows = _entries_data(opened)
    if as_json:
        print_json({**_data(opened), "entries": rows})
        return
    columns = ("kernel", "arch", "cuda#", "platform", "size#", "digest")
    cells = [
        (
            row["kernel"],
            row["arch"],
            str(row["cuda_major"] or "-"),
            row["platform"],
            show_bytes(row["bytes"]),
            row["digest"][:8],
        )
        for row in rows
    ]
    print_view(make_table(columns, cells, ["kernel"]))
    total = show_bytes(sum(row["bytes"] for row in rows))
    data = _data(opened)
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
    _report("installed", made, as_json)
    if to is not None and not as_json:
        typer.echo(f"use it with: RWKV_JIT_BUNDLE_PATH={made.root}")


@bundle_app.command("wheel")
def bundle_wheel(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Argument(help="The folder for the wheel.", metavar="FOLDER")],
    name: Annotated[str, typer.Option(help="Of the package.", metavar="NAME")] = "rwkv-jit-kernels",
    version: Annotated[str, typer.Option(help="Of the package.", metavar="VERSION")] = "0",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a Python package of a bundle, whose kernels are found once pip has installed it."""
    from ..bundle import verify_bundle  # noqa: PLC0415
    from ..bundle.wheel import write_wheel  # noqa: PLC0415
    from .tables import print_json  # noqa: PLC0415

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
    _report("signed", opened, as_json)


@bundle_app.command("keygen")
def bundle_keygen(
    path: Annotated[
        Path, typer.Argument(help="The file of the private key to make.", metavar="FILE")
    ],
    as_json: JsonOption = False,
) -> None:
    """Make a pair of keys: a private one to sign bundles with, and, in FILE.pub, the public one."""
    from ..bundle.sign import generate_key  # noqa: PLC0415
    from .tables import print_json  # noqa: PLC0415

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


def _archive_path(bundle: Bundle) -> Path:
    return bundle.root.with_name(f"{bundle.root.name}.tar")


def _entries_data(bundle: Bundle) -> list[dict[str, Any]]:
    return [
        {
            "kernel": entry.identity,
            "arch": entry.arch,
            "cuda_major": entry.cuda_major,
            "platform": entry.fields.get("platform", ""),
            "bytes": sum(record.size for record in entry.files.values()),
            "digest": entry.digest,
            "fields": dict(entry.fields),
            "files": {name: record.sha256 for name, record in entry.files.items()},
        }
        for entry in bundle.index.entries
    ]


def _data(bundle: Bundle) -> dict[str, Any]:
    return {
        "path": str(bundle.root),
        "digest": bundle.index.digest,
        "made_by": bundle.index.made_by,
        "kernels": len(bundle.index.entries),
        "signed": (bundle.root / "bundle.sig").is_file(),
    }


def _report(done: str, bundle: Bundle, as_json: bool, archive: str | None = None) -> None:
    from .tables import count_of, print_json  # noqa: PLC0415

    if as_json:
        print_json({**_data(bundle), "archive": archive})
        return
    typer.echo(f"{done} {bundle.root}: {count_of(len(bundle.index.entries), 'kernel')}")
    if archive is not None:
        typer.echo(f"archive: {archive}")
