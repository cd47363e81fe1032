"""The transport without Ray: every call runs here, in order. The reference that the ray transport must equal bit for bit."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from bomemeta.distributed.transport import Handle, Round, ShardCall, ShardReply, WorkerFactory, checked_returns


class SerialTransport:
    """One worker in this process; a handle is the array itself.

    `threads` is set for the whole process (`torch.set_num_threads`): sums differ between thread counts.
    """

    def __init__(self, factory: WorkerFactory, *, threads: int = 1, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self._worker = factory(device)

    def run(self, broadcast: np.ndarray, calls: Sequence[ShardCall]) -> Round:
        """See Transport.run; the worker's own exceptions are the only ones."""
        started = time.monotonic()
        shared = _read_only(broadcast)
        replies = []
        for call in calls:
            results = self._worker.execute(call.request, shared, *map(_read_only, call.states))
            reply, *states = checked_returns(results, call.returns)
            replies.append(ShardReply(reply, tuple(states)))
        return Round(replies, broadcast_s=0.0, compute_s=time.monotonic() - started)

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        return [_read_only(handle) for handle in handles]

    def close(self) -> None:
        pass


def _read_only(array: np.ndarray) -> np.ndarray:
    # As the object store would give it: a worker that writes into its arguments fails here too, not only on a cluster.
    view = array.view()
    view.flags.writeable = False
    return view
