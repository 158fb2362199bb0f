"""Bundles as Python packages: a wheel with a bundle in it, found by its entry point.

A wheel is a zip archive of a fixed form, so no build tool is needed to write one.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import zipfile
from pathlib import Path

from ..errors import BundleError
from .archive import bundle_files
from .places import BUNDLE_FOLDER, ENTRY_POINT_GROUP
from .read import Bundle

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9.]+)?")
# The earliest that a zip archive can tell.
_TIME = (1980, 1, 1, 0, 0, 0)


def write_wheel(bundle: Bundle, folder: Path, *, name: str, version: str) -> Path:
    """Write a wheel that installs a bundle into `folder`; its path. The same bundle, name and
    version give the same file.

    name, version: of the package. Raises BundleError if they are not valid, or if the bundle's
    kernels are for several platforms.
    """
    if _NAME.fullmatch(name) is None:
        raise BundleError(f"name={name!r} is not a name of a Python package")
    if _VERSION.fullmatch(version) is None:
        raise BundleError(f"version={version!r} is not a version of a Python package, as 1.0")
    package = re.sub(r"[-_.]+", "_", name).lower()
    if not package.isidentifier():
        raise BundleError(f"name={name!r} must begin with a letter")
    tag = f"py3-none-{_platform(bundle)}"
    info = f"{package}-{version}.dist-info"
    files = {f"{package}/__init__.py": b'"""Prebuilt kernels for rwkv_jit."""\n'}
    for file in bundle_files(bundle):
        files[f"{package}/{BUNDLE_FOLDER}/{file}"] = (bundle.root / file).read_bytes()
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Summary: Prebuilt kernels for rwkv_jit\n"
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: rwkv_jit\nRoot-Is-Purelib: false\nTag: {tag}\n"
    ).encode()
    files[f"{info}/entry_points.txt"] = (f"[{ENTRY_POINT_GROUP}]\n{package} = {package}\n").encode()
    record = f"{info}/RECORD"
    files[record] = "".join(
        [*(_record_line(path, data) for path, data in files.items()), f"{record},,\n"]
    ).encode()
    out = folder / f"{package}-{version}-{tag}.whl"
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w") as archive:
            for path, data in files.items():
                _add(archive, path, data)
        temporary.replace(out)
    except OSError as error:
        raise BundleError(f"the wheel {out} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _platform(bundle: Bundle) -> str:
    platforms = {entry.fields["platform"] for entry in bundle.index.entries}
    if len(platforms) != 1:
        raise BundleError(
            f"the bundle {bundle.root} has kernels for {len(platforms)} platforms "
            f"({', '.join(sorted(platforms))}), and a wheel is for one"
        )
    return re.sub(r"[-.]", "_", platforms.pop())


def _record_line(path: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(data)}\n"


def _add(archive: zipfile.ZipFile, path: str, data: bytes) -> None:
    info = zipfile.ZipInfo(path, date_time=_TIME)
    # A regular file that all can read, in the upper half as Unix has it.
    info.external_attr = 0o100644 << 16
    info.create_system = 3
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, data)
