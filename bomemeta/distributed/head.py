"""Watching the head of the cluster: where it is lost, Ray would wait for it for a minute and then
end this process without a word.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from bomemeta.errors import HeadLost

EVERY_S = 1.0
CONNECT_S = 2.0
# Without an answer for so long: something is wrong; what is committed is to be saved.
# Where this machine's raylet goes with the head, Ray ends this process about 3 s later.
SILENT_S = 1.2
# The head is given up. Ray itself ends the process after 60 s, and what has to be said and saved
# takes some of them. Beyond a head that restarts with its state at the same address.
LOST_S = 20.0


class HeadWatch:
    """A thread that connects to the head every second.

    `alarm` is called from it, once for each time of silence.
    """

    def __init__(
        self, address: str, on_event: Callable[[str], None], alarm: Callable[[], None]
    ) -> None:
        self._address, self._on_event, self._alarm = address, on_event, alarm
        host, _, port = address.rpartition(":")
        self._where = host.strip("[]"), int(port)
        self._lost, self._ended = threading.Event(), threading.Event()
        self._silent = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bomemeta-head", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def silent(self) -> bool:
        """Whether it did not answer when it was last asked: Ray's calls to it would wait."""
        return self._silent.is_set()

    def check(self) -> None:
        """Raises HeadLost."""
        if self.lost:
            raise HeadLost(
                f"the head of the Ray cluster at {self._address} is gone: it has not answered for {LOST_S:g} s. The same command "
                "resumes when there is a cluster again"
            )

    def end(self) -> None:
        self._ended.set()
        self._thread.join(CONNECT_S + 1)

    def _watch(self) -> None:
        heard, alarmed = time.monotonic(), False
        while not self._ended.wait(EVERY_S):
            silent_s = time.monotonic() - heard
            if self._answers():
                self._silent.clear()
                if alarmed:
                    self._on_event(f"the cluster's head at {self._address} answers again")
                heard, alarmed = time.monotonic(), False
                continue
            self._silent.set()
            if silent_s > LOST_S:
                self._lost.set()
                return
            if silent_s > SILENT_S and not alarmed:
                alarmed = True
                self._on_event(
                    f"the cluster's head at {self._address} does not answer; what is committed is saved now"
                )
                self._alarm()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(self._where, CONNECT_S):
                return True
        except OSError:
            return False
