"""The ways in which a worker is lost, and whose fault each is."""

from __future__ import annotations

import re
from pathlib import Path

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
)

from bomemeta.distributed.cluster import RayOptions
from bomemeta.errors import ClusterError

# A shard that crashed this many workers in a row, or a worker that died this often by itself while
# it started, is to blame itself.
MAX_STRIKES = 3
# Kills from outside, of workers with the same shard in the same round: beyond it the shard is
# taken to be what calls the kernel's memory killer.
MAX_KILLS = 20
# What Python and Ray write into the log of a process that crashes by a fault of its own.
CRASHES = re.compile(r"Fatal Python error: ([^\n]*)|\*\*\* (SIG(?:SEGV|ABRT|BUS|FPE|ILL)) received")
LOG_TAIL = 16_384  # bytes: a crash's words are among the last
# As Ray's memory killer says it.
SHORT = re.compile(
    r"Memory on the node \(IP: (?P<node>[^,]+), ID: [^)]*\) was "
    r"(?P<used>[\d.]+)GB(?: used)? / (?P<all>[\d.]+)GB"
)
LOGS = "Ray's logs of it are in logs/worker-* of its session directory (a cluster started here: /tmp/bm-*, kept where it failed)"


class WorkerLost(Exception):
    """A worker's death, in words that follow the worker's name; never leaves the transport. It was
    killed from outside, as far as is known: no fault of what it computed.
    """

    advice = ""  # what to do about it, from the full stop before it on


class WorkerCrashed(WorkerLost):
    """It ended by a fault of its own: a crash, an exit."""


class WorkerHung(WorkerLost):
    """Its process may still be there and must be killed."""


class WorkerUnavailable(WorkerLost):
    """It could not be reached: its process may be well, and so may what it computes. No death."""


class WorkerUnplaced(WorkerLost):
    """Its actor was given up by Ray before it ran, as when it was placed on a node that had just
    gone.
    """


def loss_of(error: RayError, starting: bool) -> WorkerLost:
    """What Ray's error says of the worker."""
    text = str(error)
    if isinstance(error, ActorUnavailableError):
        return WorkerUnavailable(f"could not be reached ({last_line(error)})")
    if isinstance(error, OutOfMemoryError) or "low on memory" in text or SHORT.search(text):
        return _out_of_memory(text)
    # Ray has no class of its own for this; should the words change, it counts as a failed start.
    if starting and "never ran" in text:
        return WorkerUnplaced(f"died ({last_line(error)})")
    if isinstance(error, NodeDiedError) or "node was terminated" in text or "node has died" in text:
        return WorkerLost(f"was lost with its node ({last_line(error)})")
    if "exit code" in text and "SIGTERM" not in text:
        return WorkerCrashed(f"ended by itself ({last_line(error)})")
    return WorkerLost(f"died ({last_line(error)})")


def _out_of_memory(text: str) -> WorkerLost:
    found = SHORT.search(text)
    where = (
        f" on {found['node']}: {found['used']} GiB of {found['all']} in use there" if found else ""
    )
    loss = WorkerLost(f"was killed for memory{where}")
    loss.advice = (
        ". Ray's memory killer did that; lower the number of workers on a node (a larger cpus_per_worker), or use more "
        "shards, so that each is smaller"
    )
    return loss


def crash_in(log: Path) -> str | None:
    """How the process that wrote this log crashed by a fault of its own, if it did."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    found = CRASHES.search(text)
    return None if found is None else (found[1] or found[2]).strip()


def poison(what: str, times: int, loss: WorkerLost, options: RayOptions) -> str:
    return (
        f"{what} took {times} workers down in a row; the last one {loss}. If memory ran out: use more shards, "
        "so that each is smaller, or fewer workers. If it was a time-out: raise step_timeout_s "
        f"(now {options.step_timeout_s:g}). If it crashed (segmentation fault): workers=0 runs it here, where a debugger "
        f"can see it. {LOGS}"
    )


def not_brought_here(error: RayError) -> ClusterError:
    """A worker's exception of which only the text has come: its class cannot be pickled, or its
    module is not installed in this process. The traceback over there is the `__cause__`.
    """
    return ClusterError(
        f"a worker raised {last_line(error)}; the exception itself cannot be brought here: its class cannot be "
        "pickled, or is of a module that is not installed where the run's driver is"
    )


def state_lost(error: ObjectLostError) -> str:
    return f"lower state was lost with its node ({error.object_ref_hex}); resume from the last checkpoint"


def last_line(error: BaseException) -> str:
    # Ray's messages are a screen long: the reason is in the last line, before advice of every kind.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(" Some common causes")[0].strip().rstrip(".")[:300]
