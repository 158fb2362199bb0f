"""StatePool: who has which slot, what is copied when, and what goes to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comparing import DECODE_OPS, random_call, run_step
from rwkv_jit import StatePool, get_op
from rwkv_jit.errors import PoolError


def small_pool(slots: int = 4, dtype: torch.dtype = torch.float32) -> StatePool:
    return StatePool(slots, layers=2, heads=3, head_size=8, dtype=dtype)


def fill(pool: StatePool, indices: torch.Tensor) -> torch.Tensor:
    """Random states in these slots."""
    states = torch.randn(2, len(indices), 3, 8, 8).to(pool.states.dtype)
    pool.states[:, indices.long()] = states
    return states


def of(pool: StatePool, indices: torch.Tensor) -> torch.Tensor:
    return pool.states[:, indices.long()]


def test_allocated_slots_are_different_and_hold_zeros() -> None:
    pool = small_pool()
    first = pool.allocate(2)
    assert first.dtype == torch.int32
    fill(pool, first)
    pool.free(first)
    everything = pool.allocate(4)
    assert sorted(everything.tolist()) == [0, 1, 2, 3]
    assert not pool.states.any()
    assert pool.free_slots == 0


def test_a_full_pool_says_so_and_stays_as_it_is() -> None:
    pool = small_pool()
    pool.allocate(3)
    with pytest.raises(PoolError, match="2 slots are wanted, but 1 of 4 are free; free some, or"):
        pool.allocate(2)
    assert pool.free_slots == 1


def test_a_fork_shares_until_one_of_both_writes() -> None:
    pool = small_pool()
    parent = pool.allocate()
    states = fill(pool, parent)
    child = pool.fork(parent)
    assert torch.equal(child, parent)
    assert pool.free_slots == 3
    own = pool.writable(child)
    assert own.item() != parent.item()
    assert torch.equal(of(pool, own), states)
    fill(pool, own)
    assert torch.equal(of(pool, parent), states)
    assert torch.equal(pool.writable(parent), parent)
    assert [pool.shares(int(slot)) for slot in (parent, own)] == [1, 1]


def test_all_forks_in_one_step_need_one_copy_less_than_they_are() -> None:
    pool = small_pool()
    parent = pool.allocate()
    states = fill(pool, parent)
    rows = torch.cat([parent, pool.fork(parent), pool.fork(parent), torch.tensor([-1])]).int()
    own = pool.writable(rows)
    assert own.dtype == torch.int32
    assert own[3] == -1
    assert len(set(own.tolist())) == 4
    assert parent.item() in own.tolist()
    for index in own[:3]:
        assert torch.equal(of(pool, index[None]), states)
    assert pool.free_slots == 1


def test_slots_of_one_owner_are_written_to_where_they_are() -> None:
    pool = small_pool()
    rows = pool.allocate(3)
    assert pool.writable(rows) is rows


def test_no_room_for_copies_leaves_everything_as_it_is() -> None:
    pool = small_pool(1)
    parent = pool.allocate()
    child = pool.fork(parent)
    with pytest.raises(PoolError, match="1 slots are wanted, but 0 of 1 are free"):
        pool.writable(child)
    assert pool.shares(0) == 2


def test_a_shared_slot_is_free_when_its_last_owner_gives_it_up() -> None:
    pool = small_pool()
    parent = pool.allocate()
    child = pool.fork(parent)
    pool.free(parent)
    assert pool.free_slots == 3
    pool.free(torch.cat([child, torch.tensor([-1], dtype=torch.int32)]))
    assert pool.free_slots == 4


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ([0, 0], "slot 0 is given up more often than it has owners"),
        ([1], "slot 1 is free; allocate it"),
        ([9], "there is no slot 9; there are 4"),
        ([-2], "there is no slot -2"),
    ],
)
def test_what_is_not_owned_cannot_be_given_up(slots: list[int], said: str) -> None:
    pool = small_pool()
    pool.allocate()
    with pytest.raises(PoolError, match=said):
        pool.free(torch.tensor(slots, dtype=torch.int32))
    assert pool.free_slots == 3


def test_a_slot_twice_in_a_step_is_refused_unless_it_was_forked() -> None:
    pool = small_pool()
    parent = pool.allocate()
    with pytest.raises(PoolError, match="more often than it has owners; fork it first"):
        pool.writable(torch.cat([parent, parent]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_goes_into_another_pool(dtype: torch.dtype) -> None:
    pool, other = small_pool(dtype=dtype), small_pool(3, dtype)
    indices = pool.allocate(2)
    states = fill(pool, indices)
    kept = pool.snapshot(indices)
    fill(pool, indices)
    assert torch.equal(kept, states)
    assert torch.equal(of(other, other.restore(kept)), states)
    with pytest.raises(PoolError, match=r"states of shape \[1, 2, 3, 8, 8\] .* axis 1 may differ"):
        other.restore(kept[:1])
    with pytest.raises(PoolError, match=r"torch.float64 do not go into"):
        other.restore(kept.double())


def test_states_come_back_from_disk(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pool = small_pool(dtype=torch.bfloat16)
    indices = pool.allocate(2)
    states = fill(pool, indices)
    pool.save(tmp_path / "states.safetensors", indices)
    assert torch.equal(of(pool, pool.load(tmp_path / "states.safetensors")), states)


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(PoolError, match=r"heads=0 .* must be at least 1"):
        StatePool(1, layers=1, heads=0, head_size=8)


@pytest.mark.parametrize("name", DECODE_OPS)
def test_a_fork_decodes_on_as_its_parent_would_have(name: str) -> None:
    op = get_op(name, head_size=8, dtype=torch.float32, device="cpu")
    pool = StatePool(5, layers=1, heads=2, head_size=8)
    call = random_call(1, 6, 2, 8, op=name.removesuffix("_decode"))
    tokens = [x.float() for x in call.tokens.values()]

    def step(indices: torch.Tensor, times: slice) -> torch.Tensor:
        part = [x[:, times].contiguous() if x.dim() == 4 else x for x in tokens]
        return run_step(op, *part, pool.states[0], indices)

    parent = pool.allocate()
    step(parent, slice(0, 3))
    child = pool.writable(pool.fork(parent))
    first = step(pool.writable(parent), slice(3, 6))
    assert torch.equal(step(child, slice(3, 6)), first)
