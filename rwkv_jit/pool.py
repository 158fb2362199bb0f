"""StatePool: the states of many sequences for the serving operators, and who has which."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from .errors import PoolError

_NOBODY = -1  # the index of a row that is skipped


class StatePool:
    """States of `slots` sequences in every layer of a model, in one tensor on one device.

    states: [layers, slots, heads, head_size, head_size]. `states[layer]` is what a serving operator
        takes as `state`.

    Indices of slots are int32 tensors [n] on the CPU, as what is free and what is shared is known
    to the host alone; copy them to where the operator wants them. An index of -1 (a row that is
    skipped) is passed over. A slot may be shared by several owners (`fork`), as where sequences
    begin with the same prefix, and is copied before one of them writes to it (`writable`). A pool
    belongs to one thread at a time.
    """

    def __init__(
        self,
        slots: int,
        *,
        layers: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (layers, slots, heads, head_size, head_size)
        if min(shape) < 1:
            raise PoolError(
                f"StatePool: slots={slots}, layers={layers}, heads={heads} and "
                f"head_size={head_size} must be at least 1"
            )
        self.states = torch.zeros(shape, dtype=dtype, device=device)
        self._owners = [0] * slots
        # The last is taken first, so that a little used pool stays in few slots.
        self._free = list(reversed(range(slots)))

    @property
    def slots(self) -> int:
        """How many states there is room for."""
        return len(self._owners)

    @property
    def free_slots(self) -> int:
        """How many slots nobody owns."""
        return len(self._free)

    def allocate(self, count: int = 1) -> torch.Tensor:
        """Take `count` slots, with states of zeros. Raises PoolError where there are fewer."""
        taken = self._take(count)
        indices = _indices(taken)
        self.states.index_fill_(1, self._places(indices), 0)
        return indices

    def free(self, indices: torch.Tensor) -> None:
        """Give up a share of each of these slots; one that has no owner left can be taken again."""
        for slot in self._owned(indices):
            self._owners[slot] -= 1
            if self._owners[slot] == 0:
                self._free.append(slot)

    def fork(self, indices: torch.Tensor) -> torch.Tensor:
        """One more share of each of these slots, for sequences that go on from the same states.

        Returns the indices of the shares, which are those of the slots until `writable` copies.
        """
        slots = self._owned(indices, often=True)
        for slot in slots:
            self._owners[slot] += 1
        return indices.clone()

    def shares(self, index: int) -> int:
        """How many owners a slot has."""
        return self._owners[index]

    def writable(self, indices: torch.Tensor) -> torch.Tensor:
        """Slots to write to instead of these: those that are shared are copied to slots of their
        own, in every layer. Call it before each step with the slots of the step.

        Raises PoolError, before anything is copied, where there is no room.
        """
        values = indices.tolist()
        seen: dict[int, int] = {}
        moved: list[int] = []
        for row, slot in enumerate(values):
            if slot == _NOBODY:
                continue
            self._check(slot)
            seen[slot] = seen.get(slot, 0) + 1
            if seen[slot] > self._owners[slot]:
                raise PoolError(
                    f"StatePool: slot {slot} is in these indices more often than it has owners; "
                    "fork it first"
                )
            # Whoever comes last needs no copy, if the others are here too.
            if seen[slot] < self._owners[slot]:
                moved.append(row)
        if not moved:
            return indices
        new = self._take(len(moved))
        old = [values[row] for row in moved]
        self.states.index_copy_(
            1, self._places(_indices(new)), self.states[:, self._places(_indices(old))]
        )
        for row, slot, copy in zip(moved, old, new, strict=True):
            self._owners[slot] -= 1
            values[row] = copy
        return _indices(values)

    def snapshot(self, indices: torch.Tensor) -> torch.Tensor:
        """A copy of these slots' states on the CPU: [layers, n, heads, head_size, head_size]."""
        self._owned(indices, often=True)
        return self.states[:, self._places(indices)].cpu()

    def restore(self, states: torch.Tensor) -> torch.Tensor:
        """Take slots for states that `snapshot` gave, of any device, and copy them there.

        Returns the slots' indices. Raises PoolError for states of another shape or dtype.
        """
        wanted = (self.states.shape[0], *self.states.shape[2:])
        if (*states.shape[:1], *states.shape[2:]) != wanted or states.dtype != self.states.dtype:
            raise PoolError(
                f"StatePool: states of shape {list(states.shape)} and {states.dtype} do not go "
                f"into a pool of {list(self.states.shape)} and {self.states.dtype}; axis 1 may "
                "differ"
            )
        indices = _indices(self._take(states.shape[1]))
        self.states.index_copy_(1, self._places(indices), states.to(self.states.device))
        return indices

    def save(self, path: str | Path, indices: torch.Tensor) -> None:
        """Write these slots' states to a safetensors file. Needs the package safetensors."""
        from safetensors.torch import save_file  # noqa: PLC0415

        save_file({"states": self.snapshot(indices)}, path)

    def load(self, path: str | Path) -> torch.Tensor:
        """Take slots for the states of a file that `save` wrote. Returns their indices."""
        from safetensors.torch import load_file  # noqa: PLC0415

        return self.restore(load_file(path)["states"])

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise PoolError(
                f"StatePool: {count} slots are wanted, but {len(self._free)} of {self.slots} are "
                "free; free some, or make a larger pool"
            )
        taken = [self._free.pop() for _ in range(count)]
        for slot in taken:
            self._owners[slot] = 1
        return taken

    def _owned(self, indices: torch.Tensor, *, often: bool = False) -> list[int]:
        """The slots of indices, without -1. often: one may be there more than it has owners."""
        slots = [slot for slot in indices.tolist() if slot != _NOBODY]
        for slot in slots:
            self._check(slot)
        for slot in set(slots):
            if not often and slots.count(slot) > self._owners[slot]:
                raise PoolError(f"StatePool: slot {slot} is given up more often than it has owners")
        return slots

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise PoolError(f"StatePool: there is no slot {slot}; there are {self.slots}")
        if self._owners[slot] == 0:
            raise PoolError(f"StatePool: slot {slot} is free; allocate it before it is used")

    def _places(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.to(self.states.device, torch.int64)


def _indices(slots: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(slots), dtype=torch.int32)
