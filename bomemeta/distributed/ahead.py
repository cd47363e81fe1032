"""Loading ahead: the batch that a worker will probably be asked for next, loaded in a thread.

A thread beside the computation needs a core of its own, which a GPU's worker has. A worker that computes on its core has time too: from
one call's answer until the next call, which on a cluster is some milliseconds.

A load is a pure function of what was asked, so a right guess gives the same bits sooner, and a wrong one gives nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Literal, NamedTuple

from bomemeta.core.problem import Split
from bomemeta.core.tree import Params

When = Literal["never", "computing", "waiting"]

# From the end of a call until a load begins that is to be done between calls: the answer goes first, which the load's Python would hold up.
PAUSE_S = 0.001


class Asked(NamedTuple):
    """What a load depends on beside the seed."""

    task_ids: tuple[int, ...]
    step: int
    split: Split
    variant: str


class Ahead:
    """Holds one batch at most, and knows what is expected after it: a worker may have several shards of a step, each of which says what it
    will be in the next one, so the next request is the oldest of these.

    `when` the thread loads: while the worker is "computing" what it was asked for, or while it is "waiting" for its next call.
    """

    def __init__(self, load: Callable[[Asked], Params], when: When = "computing") -> None:
        self._load, self._when = load, when
        self._expected: deque[Asked] = deque()
        self._begun: tuple[Asked, Future[Params | None]] | None = None
        self._late = Event()  # what has not begun to load by now need not
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bomemeta-load")

    def batch(self, asked: Asked, following: Asked | None) -> Params:
        """The batch that is asked for. `following`: what will be asked for some time after it, if that can be told.

        Raises what the load raises, here and not in the thread.
        """
        batch = self._taken(asked)
        if batch is None:
            batch = self._load(asked)
        self._expect(asked, following)
        if self._when == "computing":
            self._begin(0.0)
        return batch

    def answered(self) -> None:
        """The call is done."""
        if self._when == "waiting":
            self._begin(PAUSE_S)

    def _taken(self, asked: Asked) -> Params | None:
        if self._begun is None:
            return None
        begun, future = self._begun
        self._late.set()
        wait([future])  # another one too: no problem has to bear two loads at once
        batch = None if future.exception() is not None else future.result()  # loaded again, an error is met where it is due
        if begun == asked or batch is None:
            self._begun = None
        return batch if begun == asked else None

    def _expect(self, asked: Asked, following: Asked | None) -> None:
        if asked in self._expected:
            while self._expected.popleft() != asked:  # those before it went to other workers
                pass
        if following is not None:
            live = [each for each in self._expected if each.step >= asked.step and each != following]
            self._expected = deque([*live, following])
        if self._begun is not None and self._begun[0] not in self._expected:
            self._begun = None

    def _begin(self, pause_s: float) -> None:
        if self._begun is None and self._expected:
            first = self._expected[0]
            self._late.clear()
            self._begun = first, self._thread.submit(self._load_after, pause_s, first)

    def _load_after(self, pause_s: float, asked: Asked) -> Params | None:
        return None if pause_s and self._late.wait(pause_s) else self._load(asked)
