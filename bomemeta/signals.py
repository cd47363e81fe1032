"""Ctrl-C and SIGTERM: a run stops after the step in hand, and what is committed is saved before
SIGKILL follows.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

S = TypeVar("S")


class Stop(Generic[S]):
    """Whether the loop was asked to stop (call it), and the last committed state, which the loop
    leaves here before each step.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.signal: int | None = None  # the first one that asked
        self.kept: S | None = None

    def __call__(self) -> bool:
        return self.asked.is_set()

    def keep(self, state: S) -> None:
        """Takes a state that nobody changes any more."""
        self.kept = state

    def save_now(
        self,
        say: Callable[[str], None],
        save: Callable[[S], None],
        why: str = "",
        then: str = "",
    ) -> None:
        """Saves what is kept, from whatever thread, and says so or why not."""
        if self.kept is None:  # no step has begun: the state is as it was loaded
            return
        try:
            save(self.kept)
        except (
            Exception
        ) as error:  # whatever it is, the loop saves at the end of its step, if it gets there
            say(f"{why}the state before this step could not be saved: {error}")
        else:
            say(f"{why}the state before this step is saved{then}")


@contextmanager
def stop_on_signal(say: Callable[[str], None], save: Callable[[S], None]) -> Iterator[Stop[S]]:
    """Ctrl-C (or SIGTERM) asks the loop to stop after the step in hand; a second Ctrl-C stops at
    once.

    Who sends SIGTERM often sends SIGKILL next (`ray job stop` after 3 s), and a step may take
    longer: SIGTERM also saves the kept state while the step continues. That happens in a thread,
    since Python's own handlers wait until the main thread comes back from what it computes; `save`
    is called there, perhaps while the loop saves too. Outside the main thread signals are not ours:
    nothing is asked.
    """
    stop: Stop[S] = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.asked.is_set():
            raise KeyboardInterrupt
        stop.signal = stop.signal or number
        stop.asked.set()
        if number == signal.SIGINT:
            say("stopping after this step, with a checkpoint (once more to stop at once)")

    def watch() -> None:
        saved = False  # `uv run` and Ray both pass a SIGTERM on, so it may come twice
        while number := os.read(reader, 1)[0]:
            if number == signal.SIGTERM and not saved:
                stop.signal = stop.signal or number
                stop.asked.set()
                stop.save_now(say, save, "SIGTERM: ", "; stopping after this step")
                saved = True

    reader, writer = os.pipe()
    if hasattr(os, "set_blocking"):  # not on Windows before Python 3.12, which does without
        os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, name="bomemeta-signals", daemon=True)
    watcher.start()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    # Not Python but the C handler itself then writes a signal's number to the pipe.
    woken_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)
