"""Where bundles are: RWKV_JIT_BUNDLE_PATH, then those that were installed, then Python packages."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cache import Cache
from ..errors import BundleError
from ..settings import Settings
from .read import Bundle, open_bundle

# A package names itself here; its bundle is the folder BUNDLE_FOLDER in it.
ENTRY_POINT_GROUP = "rwkv_jit.bundles"
BUNDLE_FOLDER = "bundle"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that should be a bundle. source: "path", "installed" or "package"."""

    root: Path
    source: str


def places(settings: Settings) -> list[Place]:
    """Where bundles are looked for, in order. None of them is opened."""
    found = [Place(path.absolute(), "path") for path in settings.bundle_path]
    found += [Place(path, "installed") for path in _installed(settings)]
    found += [Place(path, "package") for path in _packages()]
    return found


def install_folder(settings: Settings) -> Path:
    """Where bundles are installed for this user; it need not exist."""
    return Cache.open(settings).root / "bundles"


def open_place(place: Place, settings: Settings) -> Bundle:
    """Open the bundle at a place. Raises BundleError."""
    # Python already runs code from where its packages are.
    guarded = place.source != "package" and not settings.allow_shared_cache
    return open_bundle(place.root, keys=settings.bundle_keys, guarded=guarded)


def bundles_in_force(settings: Settings) -> list[Bundle]:
    """The bundles that kernels are taken from, in order.

    One of RWKV_JIT_BUNDLE_PATH that cannot be used is a BundleError, and so is any in mode
    "prebuilt"; elsewhere others are left out with a warning.
    """
    found = []
    for place in places(settings):
        try:
            bundle = open_place(place, settings)
        except BundleError as error:
            if place.source == "path" or settings.mode == "prebuilt":
                raise
            warnings.warn(f"rwkv_jit: {error}; it is left out", RuntimeWarning, stacklevel=2)
            continue
        found.append(bundle)
    return found


def _installed(settings: Settings) -> Iterator[Path]:
    try:
        folders = sorted(install_folder(settings).iterdir())
    except OSError:
        return
    for folder in folders:
        # Others are being made or removed.
        if not folder.name.startswith("."):
            yield folder


@functools.cache
def _packages() -> tuple[Path, ...]:
    """The folders of installed packages with a bundle, found without running their code."""
    folders = []
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    for point in sorted(points, key=lambda point: point.name):
        # Of a module inside a package the package would be imported.
        spec = importlib.util.find_spec(point.module.partition(".")[0])
        locations = None if spec is None else spec.submodule_search_locations
        if locations:
            folders.append(Path(next(iter(locations))) / BUNDLE_FOLDER)
    return tuple(dict.fromkeys(folders))
