"""Building: a rendered source becomes an entry of the cache, once."""

from __future__ import annotations

from .build import BuildResult, build_many, obtain, warm_command
from .jobs import default_jobs, free_bytes
from .report import kernel_resources

__all__ = [
    "BuildResult",
    "build_many",
    "default_jobs",
    "free_bytes",
    "kernel_resources",
    "obtain",
    "warm_command",
]
