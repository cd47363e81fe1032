"""Adding shards among the members of a group, in the order of the tree and with no more sent than
in a ring.

A member has the shares of its own shards. It adds what the tree adds of these alone, sends each
other member that one's slice of the result, adds its own slice of everyone's in the tree's order,
and sends that to all. So each number is added in the same order as anywhere else, whatever the
number of members. Where a member's shards are one node of the tree, it sends 2 n (W - 1) / W
numbers of n, as a ring does, and holds about 3 n, however many shards there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Protocol

import numpy as np

from bomemeta.distributed.summation import TreeSum, merges

# Arrays, each with the rank of the member that it goes to or comes from.
Parcels = Iterable[tuple[int, np.ndarray]]


class Peers(Protocol):
    """A member's way to the others of its group.

    Attributes:
        rank: the member's own, of 0..world-1.
        sent_bytes: what it has sent to the others so far.
    """

    rank: int
    world: int
    sent_bytes: int

    def swap(self, out: Parcels, into: Parcels) -> None:
        """Sends the arrays of `out` and fills those of `into`, which are one-dimensional and
        contiguous. What one sends another arrives in the order in which it was sent; what has no
        numbers is not sent.
        """
        ...


def gathered(peers: Peers, own: np.ndarray) -> list[np.ndarray]:
    """All members' arrays, in the order of their ranks; every member gives one of the same length."""
    found = [own if rank == peers.rank else np.empty_like(own) for rank in range(peers.world)]
    others = [rank for rank in range(peers.world) if rank != peers.rank]
    peers.swap([(rank, own) for rank in others], [(rank, found[rank]) for rank in others])
    return found


def parts(shards: int, world: int) -> list[range]:
    """Which shards each member computes: neighbours, as evenly as can be."""
    cuts = np.array_split(np.arange(shards), world)
    return [range(int(cut[0]), int(cut[-1]) + 1) for cut in cuts if len(cut)]


@cache
def nodes_of(part: range, shards: int) -> tuple[int, ...]:
    """The nodes of the tree over all shards that those of `part` add up to by themselves."""
    there = set(part)
    for merge in merges(shards):
        if merge.left in there and merge.right in there:
            there = (there - {merge.left, merge.right}) | {merge.node}
    return tuple(sorted(there))


class SlicedSum:
    """One round's sum, at one member: its shares are added one by one, then all members ask for the
    `total`.
    """

    def __init__(self, peers: Peers, shards: int) -> None:
        self._peers, self._shards = peers, shards
        self._parts = parts(shards, peers.world)
        self._own = TreeSum(shards)

    def add(self, shard: int, share: np.ndarray) -> None:
        """`share` is fresh memory, which may be written to from now on."""
        self._own.add(shard, share)

    def total(self) -> np.ndarray:
        """Of all shards. The same at every member."""
        if self._peers.world == 1:
            return self._own.total
        rank, own = self._peers.rank, self._own.nodes
        size = next(iter(own.values())).size
        cuts = _cuts(size, self._peers.world)
        mine = cuts[rank]
        nodes = [nodes_of(part, self._shards) for part in self._parts]
        others = [other for other in range(self._peers.world) if other != rank]
        dtype = next(iter(own.values())).dtype
        slices = {node: share[mine] for node, share in own.items()}
        slices |= {
            node: np.empty(mine.stop - mine.start, dtype)
            for other in others
            for node in nodes[other]
        }
        self._peers.swap(
            [(other, own[node][cuts[other]]) for other in others for node in nodes[rank]],
            [(other, slices[node]) for other in others for node in nodes[other]],
        )
        total = TreeSum(self._shards)
        for node in sorted(slices):
            total.add(node, slices.pop(node))
        whole = own[nodes[rank][0]]  # its numbers are with those who add them
        whole[mine] = total.total
        self._peers.swap(
            [(other, whole[mine]) for other in others],
            [(other, whole[cuts[other]]) for other in others],
        )
        return whole


def _cuts(size: int, world: int) -> Sequence[slice]:
    return [slice(size * rank // world, size * (rank + 1) // world) for rank in range(world)]
