"""A shared y, and what else a solver keeps with it, that stays with the members of a group.

Every member has the same numbers, for all have run the same kernels; the driver has a `Resident`
that stands for them. Who comes new gets them from one that has them, so they are gone only where all
members are.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Collection

import numpy as np

from bomemeta.distributed.slices import Peers, gathered
from bomemeta.errors import LowerStateLost

GONE = "y stays with the workers (reduce: collective), and all that had it are gone."


class Resident:
    """A handle: the numbers that members keep under this name. They keep them for as long as the
    driver has the handle.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Resident({self.name})"


class Residents:
    """The driver's side: makes handles, and knows which of them somebody still has."""

    def __init__(self) -> None:
        self._handles: weakref.WeakSet[Resident] = weakref.WeakSet()

    def new(self) -> Resident:
        handle = Resident(uuid.uuid4().hex)  # one of another transport is known nowhere
        self._handles.add(handle)
        return handle

    @property
    def names(self) -> frozenset[str]:
        return frozenset(handle.name for handle in self._handles)


class Kept:
    """A member's side: flat arrays by name."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def forget_all_but(self, names: Collection[str]) -> None:
        self._arrays = {name: self._arrays[name] for name in self._arrays if name in names}

    def find(self, name: str) -> np.ndarray | None:
        return self._arrays.get(name)

    def put(self, name: str, array: np.ndarray) -> None:
        """`array` is nobody else's from now on."""
        self._arrays[name] = array

    def take(self, name: str, size: int, dtype: np.dtype, peers: Peers) -> np.ndarray:
        """The array of so many numbers, which those without it get from the first member that has
        it. All members call this together.

        Raises LowerStateLost where none has it.
        """
        there = gathered(peers, np.array([name in self._arrays], np.uint8))
        has = [rank for rank, found in enumerate(there) if found[0]]
        lack = [rank for rank in range(peers.world) if rank not in has]
        if not has:
            raise LowerStateLost(GONE)
        if peers.rank == has[0]:
            peers.swap([(rank, self._arrays[name]) for rank in lack], [])
        elif peers.rank in lack:
            array = np.empty(size, dtype)
            peers.swap([], [(has[0], array)])
            self._arrays[name] = array
        return self._arrays[name]
