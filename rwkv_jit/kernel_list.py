"""Lists of kernels as files: what a program used, for building it elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import OpConfig
from .errors import ConfigError
from .ops import get_spec

_SCHEMA = 1
_MAX_BYTES = 64 << 20


def write_kernels(path: Path, names: Sequence[str]) -> None:
    """Write kernels, each as "slug.entry", to a file."""
    text = json.dumps({"schema": _SCHEMA, "kernels": list(names)}, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_kernels(path: Path) -> list[tuple[OpConfig, str]]:
    """The configurations and entries of a file that `write_kernels` wrote. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data: Any = json.loads(file.read(_MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a list of kernels: {error}") from error
    names = data.get("kernels") if isinstance(data, dict) else None
    if not isinstance(names, list) or data.get("schema") != _SCHEMA:
        raise ConfigError(f"{path} is not a list of kernels that rwkv_jit.used_configs() wrote")
    return [_parse(name, path) for name in names]


def _parse(name: object, path: Path) -> tuple[OpConfig, str]:
    slug, _, entry = str(name).partition(".")
    config = OpConfig.parse(slug)
    if entry not in get_spec(config.op).entries:
        raise ConfigError(f"{path} names {name!r}, which is not a kernel")
    return config, entry
