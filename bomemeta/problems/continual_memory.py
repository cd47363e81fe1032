"""Which samples of a stream are remembered, as arrays of row numbers: a function of the seed and of
how many samples came.

Each task has slots of its own, of which every k-th is semantic (for f) and the others episodic (for
g). Where a sample goes is drawn once for all; from then on a new sample costs one write, whatever
the number of tasks or of samples before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Policy = Literal["reservoir", "ring"]
Rows = NDArray[np.int64]
NONE = -1  # no slot, no row


class Memory:
    """Row numbers in `[tasks, capacity]` slots; a task's first `semantic` slots are the semantic
    ones.

    reservoir   every sample of the task so far is in memory with the same chance (Vitter 1985,
    algorithm R) ring        the task's last `capacity` samples are
    """

    def __init__(
        self,
        starts: Sequence[int],
        capacity: int,
        semantic: int,
        policy: Policy,
        seed: np.random.SeedSequence,
    ) -> None:
        self.semantic = semantic
        self.writes = 0  # slots written since the beginning of time
        self._shape = (len(starts) - 1, capacity)
        rows = starts[-1]
        self.slots = np.full(rows, NONE, np.int64)  # where each sample goes; NONE: nowhere
        self.tasks = np.repeat(np.arange(self._shape[0]), np.diff(starts))
        draw = np.random.Generator(np.random.PCG64(seed))
        order = _mixed(capacity, semantic)
        for first, last in itertools.pairwise(starts):
            number = np.arange(last - first)
            if policy == "ring":
                self.slots[first:last] = order[number % capacity] if capacity else NONE
            else:
                drawn = draw.integers(0, number + 1)
                location = np.where(number < capacity, number, drawn)
                self.slots[first:last] = (
                    np.where(location < capacity, order[np.minimum(location, capacity - 1)], NONE)
                    if capacity
                    else NONE
                )
        self.evicts = self._evictions()
        self._begin()

    def _evictions(self) -> Rows:
        """The row that each sample takes the place of, NONE where the slot was free or there is
        none.
        """
        content = np.full(self._shape, NONE, np.int64)
        evicted = np.full(len(self.slots), NONE, np.int64)
        for row in np.flatnonzero(self.slots != NONE):
            location = self.tasks[row], self.slots[row]
            evicted[row] = content[location]
            content[location] = row
        return evicted

    def _begin(self) -> None:
        self._content = np.full(self._shape, NONE, np.int64)
        self._inserted = 0

    def content(self, inserted: int) -> Rows:
        """`[tasks, capacity]` after the first `inserted` samples of the stream; not to be written
        into, and changed by the next call.

        Forward from the last call's state; from the beginning where that was later.
        """
        if inserted < self._inserted:
            self._begin()
        new = np.arange(self._inserted, inserted)
        new = new[self.slots[new] != NONE]
        self._content[self.tasks[new], self.slots[new]] = (
            new  # of two rows for one slot the last one stays
        )
        self.writes += len(new)
        self._inserted = inserted
        return self._content

    def trained(self, first: int, last: int) -> Rows:
        """Of the samples first..last-1 those that are not semantic memory now, and those that they
        pushed out of it.

        So f is measured on samples that g does not have, and those are only late, not lost.
        """
        rows = np.arange(first, last)
        is_semantic = (self.slots[rows] != NONE) & (self.slots[rows] < self.semantic)
        pushed = self.evicts[rows[is_semantic]]
        return np.concatenate([rows[~is_semantic], pushed[pushed != NONE]])


def _mixed(capacity: int, semantic: int) -> Rows:
    """The slots in the order in which they are filled: both kinds in their proportion from the
    start, a semantic one first.
    """
    is_semantic = (np.arange(capacity) * semantic) % max(capacity, 1) < semantic
    order = np.empty(capacity, np.int64)
    order[is_semantic] = np.arange(semantic)
    order[~is_semantic] = np.arange(semantic, capacity)
    return order
