"""The kernels that take a sequence chunk by chunk on tensor cores, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..config import OpConfig
from ..spec import KernelVariant, TensorSpec
from .tensors import ORDER


@dataclass(frozen=True, slots=True)
class Block:
    """A block of threads: its warps, those that share the state, those that prepare one chunk, how
    many blocks share a multiprocessor, and the bytes of shared memory that it needs."""

    warps: int
    state_warps: int
    parts: int
    per_multiprocessor: int
    shared_bytes: int

    def constants(self) -> Mapping[str, int]:
        return {
            "warps": self.warps,
            "state_warps": self.state_warps,
            "parts": self.parts,
            "blocks": self.per_multiprocessor,
            "shared_bytes": self.shared_bytes,
        }


@dataclass(frozen=True, slots=True)
class Chunked:
    """How a sequence is worked on, from compute capability `min_arch` on or on `only_arch` alone:
    checkpoints stand before each span of tokens."""

    head_size: int
    span: int
    forward: Block
    backward: Block
    min_arch: int = 80
    only_arch: str = ""

    def variants(
        self,
        templates: str,
        constants: Callable[[OpConfig], Mapping[str, int]],
        backward_scratch: tuple[TensorSpec, ...] = (),
        backward_constants: Mapping[str, int] | None = None,
        *,
        dtype: str = "bf16",
        uses_bound: bool = False,
        rounds_checkpoints: bool = False,
    ) -> tuple[KernelVariant, KernelVariant]:
        """The variants of `<templates>_chunked_forward.cu` and `_chunked_backward.cu`.

        constants: what the templates take beside their sizes.
        backward_scratch: tensors that the backward launcher needs.
        backward_constants: what the backward template takes beside what both do.
        dtype: bf16, fp16 for decays that are bounded, or fp32 where tf32 is precise enough.
        uses_bound: whether a declared bound of the decay makes other kernels.
        rounds_checkpoints: whether checkpoints of bf16 are so themselves if none else are chosen.
        """
        checkpoint_dtypes = ("bf16", "accumulator")
        if not rounds_checkpoints:
            checkpoint_dtypes = ("accumulator", "bf16")
        forward = KernelVariant(
            entry="forward",
            template=f"{templates}_chunked_forward.cu",
            min_arch=self.min_arch,
            only_arch=self.only_arch,
            head_sizes=(self.head_size,),
            dtypes=(dtype,),
            chunk_lengths=(16,),
            constants=lambda config: {
                "checkpoint_tokens": self.span,
                "rounded_checkpoints": int(forward.checkpoint_dtype(config) == "bf16"),
                **self.forward.constants(),
                **constants(config),
            },
            scratch=(ORDER,),
            # One limit for both: the entries share their checkpoints.
            shared_bytes=max(self.forward.shared_bytes, self.backward.shared_bytes),
            checkpoint_tokens=self.span,
            checkpoint_dtypes=checkpoint_dtypes if dtype == "bf16" else ("accumulator",),
            uses_bound=uses_bound,
            needs_bound=dtype == "fp16",
            needs_tf32=dtype == "fp32",
        )
        backward = replace(
            forward,
            entry="backward",
            template=f"{templates}_chunked_backward.cu",
            constants=lambda config: {
                **forward.constants(config),
                **self.backward.constants(),
                **(backward_constants or {}),
            },
            scratch=backward_scratch,
        )
        return forward, backward
