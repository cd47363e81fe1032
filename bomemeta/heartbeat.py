"""A sign of life while something takes long and says nothing itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType

FIRST_S, EVERY_S = 5.0, 30.0  # of silence, before the first word and between two

_HEARING: ContextVar[Callable[[str], None] | None] = ContextVar("hearing", default=None)


@contextlib.contextmanager
def hearing(hear: Callable[[str], None]) -> Iterator[None]:
    """`hear` is called with what `say` is given while the block lasts."""
    token = _HEARING.set(hear)
    try:
        yield
    finally:
        _HEARING.reset(token)


def say(text: str) -> None:
    """For what takes long before a run begins: the run's listener hears it, in a worker nobody."""
    if (hear := _HEARING.get()) is not None:
        hear(text)


class Heartbeat:
    """Says what is being done and for how long, from a thread, as long as the block lasts."""

    def __init__(
        self, say: Callable[[str], None], first_s: float = FIRST_S, every_s: float = EVERY_S
    ) -> None:
        self._say, self._first_s, self._every_s = say, first_s, every_s
        self._what, self._began = "", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def doing(self, what: str) -> None:
        """What is being done from now on."""
        self._what, self._began = what, time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        wait = self._first_s
        while not self._over.wait(wait):
            seconds = time.monotonic() - self._began
            if self._what and seconds >= self._first_s:
                self._say(f"{self._what}: {seconds:.0f} s so far")
                wait = self._every_s
            else:  # something else has begun in the meantime
                wait = self._first_s - seconds if self._what else self._first_s
