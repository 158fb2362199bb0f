"""Bundles: kernels that were built elsewhere, in a plain folder that is only ever read."""

from __future__ import annotations

from .archive import copy_bundle, unpack_archive, write_archive
from .index import BundleEntry, Index
from .make import sign_bundle, write_bundle
from .match import Match, Near, explain_near, field_differences, find, find_in, nearest
from .places import Place, bundles_in_force, install_folder, open_place, places
from .read import Bundle, check_entry, open_bundle, verify_bundle
from .sign import generate_key
from .wheel import write_wheel

__all__ = [
    "Bundle",
    "BundleEntry",
    "Index",
    "Match",
    "Near",
    "Place",
    "bundles_in_force",
    "check_entry",
    "copy_bundle",
    "explain_near",
    "field_differences",
    "find",
    "find_in",
    "generate_key",
    "install_folder",
    "nearest",
    "open_bundle",
    "open_place",
    "places",
    "sign_bundle",
    "unpack_archive",
    "verify_bundle",
    "write_archive",
    "write_bundle",
    "write_wheel",
]
