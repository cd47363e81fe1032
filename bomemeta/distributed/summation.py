"""The order in which shards are added: a binary tree whose shape depends on their number alone.

Float addition is not associative, so the order is part of a result. A tree's order can be kept
wherever its nodes are added: here, or on the workers, so that the driver receives one sum and not
every shard's.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np


class Merge(NamedTuple):
    """Node `node` of the tree is the sum of two others, in this order."""

    node: int
    left: int
    right: int


@cache
def merges(leaves: int) -> tuple[Merge, ...]:
    """The additions for `leaves` shards: leaves are the nodes 0..leaves-1, the root is the last
    node. Neighbours are added, level by level; an odd one out waits for the next level.
    """
    found: list[Merge] = []
    level = list(range(leaves))
    while len(level) > 1:
        above = []
        for left, right in zip(level[::2], level[1::2], strict=False):
            found.append(Merge(leaves + len(found), left, right))
            above.append(found[-1].node)
        level = above + level[2 * len(above) :]
    return tuple(found)


def added(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A new array. Whoever asked for the sum checks that it is finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        total: np.ndarray = left + right
        return total


class TreeSum:
    """Adds shares as they arrive, in whatever order, and holds no more of them than it must. Sums of
    some of them, added elsewhere, can be given in their place.
    """

    def __init__(self, leaves: int) -> None:
        self._leaves = leaves
        self._parents = {child: merge for merge in merges(leaves) for child in merge[1:]}
        self._waiting: dict[int, np.ndarray] = {}

    def add(self, node: int, share: np.ndarray) -> None:
        """`node`: a shard, or a node of the tree of which nothing below was given."""
        while (merge := self._parents.get(node)) is not None:
            other = merge.left if node == merge.right else merge.right
            if other not in self._waiting:
                break
            sides = {node: share, other: self._waiting.pop(other)}
            node, share = merge.node, added(sides[merge.left], sides[merge.right])
        self._waiting[node] = share

    @property
    def nodes(self) -> dict[int, np.ndarray]:
        """What was added so far: nodes of the tree whose other side is not there yet."""
        return dict(self._waiting)

    @property
    def total(self) -> np.ndarray:
        """Of all shares; may be the only share itself."""
        (total,) = self._waiting.values()
        return total
