"""A worker's slot on the driver, and the phases it goes through.

The driver keeps one `Slot` per worker, in one of five phases:

    STARTING --built--> IDLE --dispatch--> BUSY --answer--> IDLE
        |                |                   |
        |                +--ping--> DRAINING |     DRAINING: still at a call whose answer nobody wants
        |                                    |
        +--died or overdue, in any phase: the actor is killed and the slot is STARTING with a new one
        +--no room, crashed MAX_STRIKES times at its start, or not there in time: ABSENT, the others do the work until it
           is tried again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import ray

from bomemeta.distributed.actor import Process
from bomemeta.distributed.soonest import Soonest
from bomemeta.distributed.transport import nothing

# How often a wait is broken off to see whether the cluster is still there.
CHECK_EVERY_S = 1.0


class Phase(Enum):
    STARTING = auto()
    IDLE = auto()
    BUSY = auto()
    DRAINING = auto()
    ABSENT = auto()


@dataclass
class Slot:
    index: int
    phase: Phase = Phase.ABSENT
    actor: Any = None
    process: Process | None = None  # None until the worker is built
    refs: list[Any] = field(
        default_factory=list
    )  # what the slot's actor will answer; all are ready when the first is
    job: int = -1  # of the round's plan, while BUSY
    begun: float = (
        0.0  # when it was given the job, or its answer before was heard, monotonic seconds
    )
    next_job: int = (
        -1
    )  # while BUSY: what was given to it beforehand, to follow the job in hand; -1: nothing
    next_refs: list[Any] = field(default_factory=list)
    failed_starts: int = 0
    unreached: int = 0  # times in a row that its worker could not be reached
    absent_until: float = 0.0  # while ABSENT: not started again before, monotonic seconds
    role: str = "worker"  # as messages say

    def __str__(self) -> str:
        return f"{self.role} {self.index}" + (f" (pid {self.process.pid})" if self.process else "")


class Slots:
    """All slots. What is looked up for every answer is kept, so that no answer costs a walk over
    them.
    """

    def __init__(self, count: int, role: str = "worker") -> None:
        self.slots = [Slot(index, role=role) for index in range(count)]
        self._phases: dict[Phase, dict[int, Slot]] = {phase: {} for phase in Phase}
        self._phases[Phase.ABSENT] = {slot.index: slot for slot in self.slots}
        self.check: Callable[[], None] = nothing
        self.silent: Callable[[], bool] = bool  # whether the cluster's head cannot be asked now
        self._watched: dict[Any, Slot] = {}  # by the first of the references
        self._deadlines: Soonest[int] = Soonest()  # by slot, monotonic seconds

    def in_phase(self, phase: Phase) -> dict[int, Slot]:
        """The slots in a phase, by number, in the order in which they came to it. Changes as they
        do.
        """
        return self._phases[phase]

    @property
    def waiting(self) -> bool:
        """Whether there is anybody to wait for."""
        return bool(self._watched)

    def watch(self, slot: Slot, phase: Phase, refs: list[Any], within_s: float) -> None:
        """The slot's actor is to answer within so many seconds."""
        self._move(slot, phase)
        slot.refs = refs
        self._watched[refs[0]] = slot
        self._deadlines.set(slot.index, time.monotonic() + within_s)

    def hasten(self, slot: Slot, within_s: float) -> None:
        """The slot's actor has so many seconds left at most."""
        end = time.monotonic() + within_s
        if slot.index in self._deadlines and end < self._deadlines[slot.index]:
            self._deadlines.set(slot.index, end)

    def rest(self, slot: Slot, phase: Phase) -> None:
        """Nothing is expected of the slot: it is idle, or absent."""
        self._move(slot, phase)
        slot.refs = []

    def _move(self, slot: Slot, phase: Phase) -> None:
        if slot.refs:
            self._watched.pop(slot.refs[0], None)
        self._deadlines.drop(slot.index)
        del self._phases[slot.phase][slot.index]
        self._phases[phase][slot.index] = slot
        slot.phase = phase

    def heard(self, until: float | None = None) -> Iterator[tuple[Slot, bool]]:
        """Every slot that has an answer by now (False); where there is none, waits for the first,
        or gives the first slot whose time is over (True). Nothing at `until` (monotonic seconds).

        Each is to be dealt with before the next is taken. Raises ClusterError where there is nobody
        to wait for, or where `check` finds that waiting is in vain.
        """
        earliest = self._deadlines.least()
        if earliest is None:
            self.wait_for_room()
            return
        end = earliest[0] if until is None else min(until, earliest[0])
        refs = list(self._watched)
        ready: list[Any] = []
        while not ready:
            self.check()
            left_s = end - time.monotonic()
            ready, _ = ray.wait(refs, num_returns=1, timeout=min(max(0.0, left_s), CHECK_EVERY_S))
            if left_s <= CHECK_EVERY_S:
                break
        if ready and len(refs) > 1:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            if (slot := self._watched.get(ref)) is not None:
                yield slot, False
        if not ready and end == earliest[0]:
            yield self.slots[earliest[1]], True

    def wait_for_room(self) -> None:
        """Called where there is nobody to wait for."""
        raise NotImplementedError
