"""The operators' specs, by name."""

from __future__ import annotations

from ..errors import ConfigError
from ..spec import OpSpec
from .cross_entropy import L2WRAP_CROSS_ENTROPY
from .decode import DECODES
from .gates import A_GATE, RELU_SQUARED, VRES_GATE
from .kk_pre import K_UPDATE, KK_PRE
from .prefill import PREFILLS
from .readout import GATE_OUTPUT_CORRECTION, READOUT
from .token_shift import ADDCMUL_MIX, TOKEN_SHIFT_MIX
from .wkv5 import WKV5
from .wkv6 import WKV6
from .wkv7 import WKV7

ELEMENTWISE = (
    *(TOKEN_SHIFT_MIX, A_GATE, VRES_GATE, KK_PRE, READOUT, RELU_SQUARED),
    # The layer cut as FLA's functions cut it.
    *(ADDCMUL_MIX, K_UPDATE, GATE_OUTPUT_CORRECTION),
)
SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        *(WKV5, WKV6, WKV7),
        *DECODES,
        *PREFILLS,
        *ELEMENTWISE,
        L2WRAP_CROSS_ENTROPY,
    )
}


def get_spec(name: str) -> OpSpec:
    """The spec called `name`. Raises ConfigError with the names that exist."""
    spec = SPECS.get(name)
    if spec is None:
        raise ConfigError(f"operator {name!r} does not exist; choose from {', '.join(SPECS)}")
    return spec
