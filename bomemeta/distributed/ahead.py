"""Loading ahead: the batch that a worker will probably be asked for next, loaded in a thread while
it computes.

A load is a pure function of what was asked, so a right guess gives the same bits sooner, and a
wrong one gives nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from bomemeta.core.problem import Split
from bomemeta.core.tree import Params


class Asked(NamedTuple):
    """What a load depends on beside the seed."""

    task_ids: tuple[int, ...]
    step: int
    split: Split
    variant: str


class Ahead:
    """Holds one batch at most, and knows what is expected after it: a worker may have several
    shards of a step, each of which says what it will be in the next one, so the next request is the
    oldest of these.
    """

    def __init__(self, load: Callable[[Asked], Params]) -> None:
        self._load = load
        self._expected: deque[Asked] = deque()
        self._begun: tuple[Asked, Future[Params]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bomemeta-load")

    def batch(self, asked: Asked, following: Asked | None) -> Params:
        """The batch that is asked for. `following`: what will be asked for some time after it, if
        that can be told.

        Raises what the load raises, here and not in the thread.
        """
        batch = self._taken(asked)
        if batch is None:
            batch = self._load(asked)
        self._expect(asked, following)
        return batch

    def _taken(self, asked: Asked) -> Params | None:
        if self._begun is None:
            return None
        begun, future = self._begun
        wait([future])  # another one too: no problem has to bear two loads at once
        if begun != asked:
            return None
        self._begun = None
        return (
            None if future.exception() is not None else future.result()
        )  # loaded again, an error is met where it is due

    def _expect(self, asked: Asked, following: Asked | None) -> None:
        if asked in self._expected:
            while self._expected.popleft() != asked:  # those before it went to other workers
                pass
        if following is not None:
            live = [
                each for each in self._expected if each.step >= asked.step and each != following
            ]
            self._expected = deque([*live, following])
        if self._begun is not None and self._begun[0] not in self._expected:
            self._begun = None
        if self._begun is None and self._expected:
            first = self._expected[0]
            self._begun = first, self._thread.submit(self._load, first)
