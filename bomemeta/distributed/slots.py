"""A worker's slot on the driver: the phases it goes through, the ways in which its worker is lost,
and how they are told.

The driver keeps one `Slot` per worker, in one of five phases:

    STARTING --built--> IDLE --dispatch--> BUSY --answer--> IDLE
        |                |                   |
        |                +--ping--> DRAINING |     DRAINING: still at a call whose answer nobody wants
        |                                    |
        +--died or overdue, in any phase: the actor is killed and the slot is STARTING with a new one
        +--no room, did not start MAX_STRIKES times, or not in time: ABSENT, the others do the work until it is tried again
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from ray.exceptions import ObjectLostError

from bomemeta.distributed.actor import Process
from bomemeta.distributed.cluster import RayOptions

# A shard that took this many workers down in a row, or a worker that died this often while it
# started, is to blame itself.
MAX_STRIKES = 3


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

    def __str__(self) -> str:
        return f"worker {self.index}" + (f" (pid {self.process.pid})" if self.process else "")


class WorkerLost(Exception):
    """A worker's death, in words that follow the worker's name; never leaves the transport."""


class WorkerUnavailable(WorkerLost):
    """It could not be reached: its process may be well, and so may what it computes. No death."""


class WorkerUnplaced(WorkerLost):
    """Its actor was given up by Ray before it ran, as when it was placed on a node that had just
    gone.
    """


class WorkerHung(WorkerLost):
    """Its process may still be there and must be killed."""


LOGS = "Ray's logs of it are in logs/worker-* of its session directory (/tmp/ray/session_latest unless set otherwise)"


def poison(what: str, loss: WorkerLost, options: RayOptions) -> str:
    return (
        f"{what} took {MAX_STRIKES} workers down in a row; the last one {loss}. If memory ran out: use more shards, "
        "so that each is smaller, or fewer workers. If it was a time-out: raise step_timeout_s "
        f"(now {options.step_timeout_s:g}). If it crashed (segmentation fault): workers=0 runs it here, where a debugger "
        f"can see it. {LOGS}"
    )


def state_lost(error: ObjectLostError) -> str:
    return f"lower state was lost with its node ({error.object_ref_hex}); go on from the last checkpoint"


def last_line(error: BaseException) -> str:
    # Ray's messages are a screen long: the reason is in the last line, before advice of every kind.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(" Some common causes")[0].rstrip(".")[:300]
