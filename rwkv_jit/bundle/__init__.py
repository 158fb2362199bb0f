"""Bundles: kernels that were built elsewhere, in a plain folder that is only ever read.

What makes and moves them is in their modules, so that reading one imports none of it."""

from __future__ import annotations

from .index import BundleEntry, Index
from .match import Match, Near, explain_near, field_differences, find, find_in, nearest
from .places import Place, bundles_in_force, install_folder, open_place, places
from .read import Bundle, check_entry, open_bundle, verify_bundle

__all__ = [
    "Bundle",
    "BundleEntry",
    "Index",
    "Match",
    "Near",
    "Place",
    "bundles_in_force",
    "check_entry",
    "explain_near",
    "field_differences",
    "find",
    "find_in",
    "install_folder",
    "nearest",
    "open_bundle",
    "open_place",
    "places",
    "verify_bundle",
]
