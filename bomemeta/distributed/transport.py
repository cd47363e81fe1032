"""What the engine asks of a transport. `serial` (this process) and `ray` (actors) answer it in the same way, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

# A per-task lower state on its way between steps: an array (serial, or fresh from a checkpoint) or a `ray.ObjectRef`.
Handle = Any


class Worker(Protocol):
    """Computes one shard. Stateless between calls: whatever it needs comes with the call, so any worker can run any shard."""

    def execute(self, request: Any, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        """Returns `(reply, *new_states)`: one picklable reply and exactly `ShardCall.returns` arrays.

        `broadcast` and `states` are read-only memory, valid during the call. What is returned must be fresh memory: a
        buffer that the worker writes again in its next call would change an answer that was already given.
        """
        ...


# Called with the device ("cpu" or "cuda:0") where the worker will live (in the actor's process), so it must be
# picklable and small.
WorkerFactory = Callable[[str], Worker]


class ShardCall(NamedTuple):
    """One shard's share of a round."""

    request: Any  # small and picklable: the kernel (by name), its arguments, task ids, step
    states: tuple[Handle, ...] = ()  # one handle per task that carries state
    returns: int = 0  # how many new states come back


class ShardReply(NamedTuple):
    reply: Any
    states: tuple[Handle, ...]


class Round(NamedTuple):
    """The answers of one round, in the order of the calls, and where its time went (seconds).

    Arrays in a reply may be read-only memory of the object store: they hold its pages for as long as they live, so add
    them up or copy them, and let them go.
    """

    replies: list[ShardReply]
    broadcast_s: float
    compute_s: float


class Transport(Protocol):
    def run(self, broadcast: np.ndarray, calls: Sequence[ShardCall]) -> Round:
        """Sends `broadcast` (one flat array) once, runs every call somewhere, and returns the replies in the order of `calls`.

        An exception raised by the worker's own code arrives here with its own type. A worker that died or hangs is replaced and its
        unfinished call is run again elsewhere: the caller notices nothing but time.

        Raises LowerStateLost where a handle among the states is gone with its node, and ClusterError where the workers
        cannot be had or a shard kills every worker that tries it. After an exception the transport can be used again.
        """
        ...

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        """The arrays behind the handles, in order; what a checkpoint stores. Read-only memory: copies are the caller's.

        Raises LowerStateLost.
        """
        ...

    def close(self) -> None:
        """Gives back workers and, where this transport started it, the cluster. May be called twice."""
        ...


def checked_returns(results: tuple[Any, ...], returns: int) -> tuple[Any, ...]:
    """`results` of `Worker.execute`, or a TypeError where they are not one reply and `returns` arrays."""
    if not isinstance(results, tuple) or len(results) != 1 + returns:
        got = f"{len(results)} values" if isinstance(results, tuple) else type(results).__name__
        raise TypeError(
            f"Worker.execute returned {got}; this call wants a tuple of 1 reply and {returns} states. "
            "Return (reply, *new_states), with as many states as ShardCall.returns."
        )
    return results
