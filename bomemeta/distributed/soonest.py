"""The least of many numbers that change."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=int)


class Soonest(Generic[K]):
    """A number for each key, and the key whose number is the least: O(log n) a change, on average.

    A heap in which numbers that have changed stay until they come to the top, or until there are
    more of them than of the others.
    """

    def __init__(self) -> None:
        self._numbers: dict[K, float] = {}
        self._heap: list[tuple[float, K]] = []

    def __contains__(self, key: K) -> bool:
        return key in self._numbers

    def __getitem__(self, key: K) -> float:
        return self._numbers[key]

    def set(self, key: K, number: float) -> None:
        self._numbers[key] = number
        heapq.heappush(self._heap, (number, key))
        if len(self._heap) > 2 * len(self._numbers) + 8:
            self._heap = [(number, key) for key, number in self._numbers.items()]
            heapq.heapify(self._heap)

    def drop(self, key: K) -> None:
        self._numbers.pop(key, None)

    def least(self) -> tuple[float, K] | None:
        """The least number and its key; None where there are none."""
        while self._heap:
            number, key = self._heap[0]
            if self._numbers.get(key) == number:
                return number, key
            heapq.heappop(self._heap)
        return None

    def until(self, limit: float) -> Iterator[K]:
        """Takes out the keys whose numbers are not above the limit, the least first."""
        while (first := self.least()) is not None and first[0] <= limit:
            del self._numbers[first[1]]
            yield first[1]
