"""The sum that members of a group make among themselves: real processes, real gloo, and the bits of
the tree in one process.
"""

from __future__ import annotations

import functools
import multiprocessing
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch.distributed

from bomemeta.distributed.process_group import GroupBroken, GroupMember, ProcessGroup
from bomemeta.distributed.resident import Kept, Residents
from bomemeta.distributed.slices import SlicedSum, gathered, nodes_of, parts
from bomemeta.distributed.summation import TreeSum
from bomemeta.errors import LowerStateLost

dist: Any = torch.distributed
MOST = 3  # members
# Shards and numbers in each: even, uneven, fewer numbers than members.
CASES = [(3, 12), (4, 1000), (5, 7), (8, 10), (11, 100_003), (12, 2), (3, 1)]
LARGE = 100_000


def share(shard: int, size: int) -> np.ndarray:
    """Numbers of very different sizes, so that another order has other bits."""
    rng = np.random.default_rng([shard, size])
    return (rng.normal(size=size) * 10.0 ** rng.integers(-6, 6, size)).astype(np.float32)


def in_one_process(shards: int, size: int) -> np.ndarray:
    total = TreeSum(shards)
    for shard in range(shards):
        total.add(shard, share(shard, size))
    return total.total


def added(peers: ProcessGroup, shards: int, size: int) -> np.ndarray:
    total = SlicedSum(peers, shards)
    for shard in parts(shards, peers.world)[peers.rank]:
        total.add(shard, share(shard, size))
    return total.total()


def work(rank: int, port: int, answers: Any) -> None:
    """A member of a group of each size that has room for it."""
    peers = ProcessGroup()
    for world in range(max(rank + 1, 1), MOST + 1):
        peers.join(GroupMember(world, rank, world, "127.0.0.1", port, 60.0))
        for shards, size in CASES:
            answers.put((world, rank, (shards, size), added(peers, shards, size).tobytes()))
        ranks = gathered(peers, np.array([rank]))
        before = peers.sent_bytes
        added(peers, world, LARGE)  # a shard each
        sent = peers.sent_bytes - before
        tracemalloc.start()
        added(peers, 16, LARGE)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        answers.put((world, rank, "ranks", [int(found[0]) for found in ranks]))
        answers.put((world, rank, "sent", sent))
        answers.put((world, rank, "peak", peak))
        kept = Kept()
        if rank == world - 1:
            kept.put("there", share(0, LARGE))
        taken = kept.take("there", LARGE, np.dtype(np.float32), peers)
        answers.put((world, rank, "joined", taken.tobytes()))
        try:
            kept.take("nowhere", LARGE, np.dtype(np.float32), peers)
        except LowerStateLost as error:
            answers.put((world, rank, "none has it", str(error)))
    # One leaves in the middle of a sum that nobody else can finish.
    if rank == MOST - 1:
        return
    try:
        added(peers, 6, 2)  # fewer numbers than members: who has none to add waits for the others
    except GroupBroken as error:
        answers.put((MOST, rank, "lost", str(error)))


@functools.cache
def found() -> dict[tuple[int, int, Any], Any]:
    """The result of each member of each group, by (members, rank, what)."""
    forking = multiprocessing.get_context("fork")  # torch is imported once
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = forking.Queue()
    members = [
        forking.Process(target=work, args=(rank, store.port, answers)) for rank in range(MOST)
    ]
    for member in members:
        member.start()
    groups = sum(range(1, MOST + 1))
    wanted = groups * (len(CASES) + 5) + MOST - 1
    got = [answers.get(timeout=120) for _ in range(wanted)]
    for member in members:
        member.join(30)
    assert [member.exitcode for member in members] == [0] * MOST
    return {(world, rank, what): value for world, rank, what, value in got}


@pytest.mark.parametrize("world", range(1, MOST + 1))
def test_members_add_to_the_bits_of_one_process(world):
    for case in CASES:
        expected = in_one_process(*case).tobytes()
        for rank in range(world):
            assert found()[world, rank, case] == expected, (case, rank)
    assert all(found()[world, rank, "ranks"] == list(range(world)) for rank in range(world))


def test_the_order_matters_here():
    """Or the test above could not fail."""
    shards, size = 11, 100_003
    straight = sum((share(shard, size) for shard in range(1, shards)), share(0, size))
    assert straight.tobytes() != in_one_process(shards, size).tobytes()


@pytest.mark.parametrize("world", range(1, MOST + 1))
def test_a_member_sends_what_a_ring_would(world):
    ring = 2 * LARGE * 4 * (world - 1) / world
    for rank in range(world):
        assert found()[world, rank, "sent"] == pytest.approx(ring, abs=8 * world)


@pytest.mark.parametrize("world", range(1, MOST + 1))
def test_what_a_member_holds_does_not_grow_with_the_shards(world):
    """16 of them: their shares alone would be 16, and the generator of a share takes 6 by itself."""
    whole = LARGE * 4
    for rank in range(world):
        assert found()[world, rank, "peak"] < 13 * whole


def test_who_is_left_hears_at_once_that_a_member_is_gone():
    assert {rank for _, rank, what in found() if what == "lost"} == set(range(MOST - 1))


@pytest.mark.parametrize("world", range(1, MOST + 1))
def test_who_comes_new_gets_what_the_others_keep(world):
    for rank in range(world):
        assert found()[world, rank, "joined"] == share(0, LARGE).tobytes()
        assert "all that had it are gone" in found()[world, rank, "none has it"]


def test_members_keep_what_the_driver_has_a_handle_of():
    residents, kept = Residents(), Kept()
    first, second = residents.new(), residents.new()
    for handle in (first, second):
        kept.put(handle.name, np.zeros(1))
    gone = first.name
    del first, handle
    kept.forget_all_but(residents.names)
    assert kept.find(gone) is None
    assert kept.find(second.name) is not None


def test_members_have_neighbouring_shards():
    assert parts(8, 3) == [range(3), range(3, 6), range(6, 8)]
    assert parts(2, 3) == [range(1), range(1, 2)]
    # Of the tree over 8 shards (8: 0 + 1, 9: 2 + 3, 10: 4 + 5, 11: 6 + 7): what each can add alone.
    assert [nodes_of(part, 8) for part in parts(8, 3)] == [(2, 8), (3, 10), (11,)]
    assert [nodes_of(part, 8) for part in parts(8, 2)] == [(12,), (13,)]
