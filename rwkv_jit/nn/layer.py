"""What the modules of a layer share: its number, and how it is taken from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

_Layer = TypeVar("_Layer", bound="Layer")


class Layer(nn.Module):
    """A part of the layer with number `layer`, from 0, of a model that has `layers`.

    Raises ArgumentError for a number that the model does not have.
    """

    # What RWKV-LM's models call this part of a layer.
    part: ClassVar[str]

    def __init__(self, layer: int, layers: int) -> None:
        super().__init__()
        if not 0 <= layer < layers:
            raise ArgumentError(
                f"{type(self).__name__}: layer={layer} must be at least 0 and below layers={layers}"
            )
        self.layer, self.layers = layer, layers

    @classmethod
    def from_checkpoint(
        cls: type[_Layer],
        checkpoint: Mapping[str, Tensor],
        layer: int,
        layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Layer:
        """That of one layer of an RWKV-LM checkpoint, whatever its sizes.

        checkpoint: tensors by name, `blocks.<layer>.att.<parameter>` for time mixing and
            `blocks.<layer>.ffn.<parameter>` for channel mixing.
        device, dtype: to convert to; as they are if None.
        """
        prefix = f"blocks.{layer}.{cls.part}."
        part = {
            name.removeprefix(prefix): tensor.to(device=device, dtype=dtype, copy=True)
            for name, tensor in checkpoint.items()
            if name.startswith(prefix)
        }
        if not part:
            raise ArgumentError(
                f"{cls.__name__}: the checkpoint has no {prefix}*; pass one in RWKV-LM's format, "
                "and the number of a layer that it has"
            )
        module = cls._sized_as(part, layer, layers)
        module.load_state_dict(part, assign=True)
        return module

    @classmethod
    def _sized_as(cls: type[_Layer], part: Mapping[str, Tensor], layer: int, layers: int) -> _Layer:
        """One on the meta device, of the sizes that these parameters have."""
        raise NotImplementedError
