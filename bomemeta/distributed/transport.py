"""What the engine asks of a transport. `serial` (this process) and `ray` (actors) answer it in the
same way, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bomemeta.distributed.resident import Kept, Resident
from bomemeta.distributed.slices import Peers

# A per-task lower state on its way between steps: an array (serial, or fresh from a checkpoint), a
# `ray.ObjectRef`, or a `Resident` that stands for what the members of a group keep.
Handle = Any


class Worker(Protocol):
    """Computes one shard. Stateless between calls: whatever it needs comes with the call, so any
    worker can run any shard.
    """

    def execute(self, request: Any, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        """Returns `(reply, *new_states)`, or `(reply, share, *new_states)` where
        `ShardCall.summed`: one picklable reply, this shard's share of the round's sum (one flat
        array, as long for every shard), and exactly `ShardCall.returns` arrays.

        `broadcast` and `states` are read-only memory, valid during the call. What is returned must
        be fresh memory: a buffer that the worker writes again in its next call would change an
        answer that was already given.
        """
        ...


# Called with the device ("cpu" or "cuda:0") where the worker will live (in the actor's process), so
# it must be picklable and small.
WorkerFactory = Callable[[str], Worker]


class ShardCall(NamedTuple):
    """One shard's share of a round."""

    request: Any  # small and picklable: the kernel (by name), its arguments, task ids, step
    states: tuple[Handle, ...] = ()  # one handle per task that carries state
    returns: int = 0  # how many new states come back
    summed: bool = (
        False  # whether the worker gives a share of the round's sum; all calls of a round, or none
    )
    kind: str = ""  # calls of one kind and number in their round are expected to take the same time


class ShardReply(NamedTuple):
    reply: Any
    states: tuple[Handle, ...]


class Round(NamedTuple):
    """The answers of one round, in the order of the calls, and where its time went (seconds).

    Arrays in a reply may be read-only memory of the object store: they hold its pages for as long
    as they live, so copy them, and let them go.
    """

    replies: list[ShardReply]
    broadcast_s: float
    compute_s: float  # until the last answer was there
    reduce_s: float = 0.0  # adding here, some of it while workers still computed
    total: np.ndarray | None = (
        None  # the sum of the shares, in the order of `summation.merges`; may be read-only
    )
    driver_bytes: int = 0  # of shares and sums that came to this process


def nothing() -> None:
    pass


class JointRequest(Protocol):
    """What all workers execute together, as the members of a group."""

    def execute(
        self, worker: Any, broadcast: np.ndarray, peers: Peers, kept: Kept, name: str
    ) -> Any:
        """Runs on every member at once; what the first returns is the answer. Members that are
        alike get the same bits. What is to stay with them each puts into `kept` under `name`, as
        its last act.
        """
        ...


class Transport(Protocol):
    """`collective`: whether `run_together` is there, and kernels of a shared lower problem are to
    run through it.
    """

    @property
    def collective(self) -> bool: ...

    @property
    def workers(self) -> tuple[int, int] | None:
        """How many workers are alive, and of how many; None where the tasks are computed in this
        process.
        """
        ...

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        """Sends `broadcast` (one flat array) once, runs every call somewhere, and returns the
        replies in the order of `calls`, and the sum of the shares where the calls are `summed`.
        `meanwhile` is called once, as soon as there is nothing to do here but to wait; what it
        raises ends the round.

        An exception raised by the worker's own code arrives here with its own type. A worker that
        died or hangs is replaced and its unfinished call is run again elsewhere: the caller notices
        nothing but time.

        Raises LowerStateLost where a handle among the states is gone with its node, HeadLost where
        the cluster's head is, and ClusterError where the workers cannot be had or a shard kills every worker that tries it.
        After an exception the transport can be used again.
        """
        ...

    def run_together(
        self, broadcast: np.ndarray, request: JointRequest, shards: int
    ) -> tuple[Any, Resident]:
        """The first member's answer to `request.execute`, run by at most `shards` workers together,
        and the handle of what they kept. Raises as `run`.
        """
        ...

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        """The arrays behind the handles, in order; what a checkpoint stores. Read-only memory:
        copies are the caller's.

        Raises LowerStateLost.
        """
        ...

    def guard(self, save: Callable[[], None]) -> None:
        """`save` is called, from a thread of its own and perhaps while a round is on its way, where
        what the transport runs on seems to be going.
        """
        ...

    def show(self, run: str, metrics: Mapping[str, float]) -> None:
        """Shows a step's metrics where the operators of the machines look: in Ray's own, tagged with
        the name of the run.
        """
        ...

    def close(self) -> None:
        """Gives back workers and, where this transport started it, the cluster. May be called
        twice.
        """
        ...


def checked_returns(results: tuple[Any, ...], returns: int, summed: bool) -> tuple[Any, ...]:
    """`results` of `Worker.execute`, or a TypeError where they are not one reply, a share if
    `summed`, and `returns` arrays.
    """
    if not isinstance(results, tuple) or len(results) != 1 + summed + returns:
        got = f"{len(results)} values" if isinstance(results, tuple) else type(results).__name__
        share, wanted = (", 1 share", ", share") if summed else ("", "")
        raise TypeError(
            f"Worker.execute returned {got}; this call wants a tuple of 1 reply{share} and {returns} states. "
            f"Return (reply{wanted}, *new_states), with as many states as ShardCall.returns."
        )
    return results
