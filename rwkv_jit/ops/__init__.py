"""The operators' specs, by name."""

from __future__ import annotations

from ..errors import ConfigError
from ..spec import OpSpec
from .decode import DECODES
from .prefill import PREFILLS
from .wkv5 import WKV5
from .wkv6 import WKV6
from .wkv7 import WKV7

SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (WKV5, WKV6, WKV7, *DECODES, *PREFILLS)}


def get_spec(name: str) -> OpSpec:
    """The spec called `name`. Raises ConfigError with the names that exist."""
    spec = SPECS.get(name)
    if spec is None:
        raise ConfigError(f"operator {name!r} does not exist; choose from {', '.join(SPECS)}")
    return spec
