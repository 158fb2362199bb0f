"""wkv6: the RWKV-6 time-mixing recurrence, and what RWKV-5 shares with it."""

from __future__ import annotations

from collections.abc import Mapping

from ..spec import EntrySpec, KernelVariant, OpSpec, TensorSpec
from .chunked import Block, Chunked
from .recurrence import recurrence_variants
from .tensors import (
    CHECKPOINTS,
    CU_SEQLENS,
    DFINAL_STATE,
    DINITIAL_STATE,
    DY,
    FINAL_STATE,
    INITIAL_STATE,
    K,
    R,
    V,
    W,
    Y,
    gradient,
)

PARAMETERS = ("r", "w", "k", "v", "u", "initial_state", "output_final_state", "cu_seqlens")
_U = TensorSpec(
    name="u", shape=("H", "N"), dtype=("op", "fp32"), meaning="bonus of the token's own key"
)


def bonus_entries(w: TensorSpec) -> Mapping[str, EntrySpec]:
    """The entries of a recurrence with a bonus and this decay."""
    given = (R, w, K, V, _U)
    return {
        "forward": EntrySpec(
            inputs=(*given, CU_SEQLENS, INITIAL_STATE),
            outputs=(Y, FINAL_STATE, CHECKPOINTS),
        ),
        "backward": EntrySpec(
            inputs=(*given, CU_SEQLENS, CHECKPOINTS, DY, DFINAL_STATE),
            outputs=(*map(gradient, given), DINITIAL_STATE),
        ),
    }


def bonus_variants(
    chunked: tuple[Chunked, ...], *, decay_per_token: bool
) -> tuple[KernelVariant, ...]:
    """The kernels, for a decay of each token or one for all of them."""
    summed = ("du",) if decay_per_token else ("du", "dw")
    parts = tuple(
        TensorSpec(
            name=f"{name}_parts",
            shape=("S", "H", "N"),
            dtype=("accumulator",),
            meaning=f"each sequence's part of {name}",
        )
        for name in summed
    )
    constants = {"decay_per_token": int(decay_per_token)}
    return (
        *(
            variant
            for row in chunked
            for variant in row.variants("wkv6", lambda _: constants, parts)
        ),
        *recurrence_variants("wkv6", constants, backward_scratch=parts),
    )


# On tensor cores, by what shared memory allows; the first that fits is used.
_CHUNKED = (
    Chunked(64, 64, forward=Block(8, 8, 2, 2, 96_512), backward=Block(8, 8, 2, 1, 164_352)),
    Chunked(64, 32, forward=Block(8, 8, 4, 2, 48_384), backward=Block(8, 8, 4, 1, 82_304)),
)

WKV6 = OpSpec(
    name="wkv6",
    summary="RWKV-6 time mixing: a linear recurrence with a decay per token and a bonus",
    formula="y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T",
    parameters=PARAMETERS,
    entries=bonus_entries(W),
    saved_outputs=("checkpoints",),
    decays=("loglog", "log"),
    variants=bonus_variants(_CHUNKED, decay_per_token=True),
)
