"""The transport without Ray: every call runs here, in order. The reference that the ray transport
must equal bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bomemeta.distributed.resident import Resident
from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import (
    Handle,
    JointRequest,
    Round,
    ShardCall,
    ShardReply,
    WorkerFactory,
    checked_returns,
    nothing,
)


class SerialTransport:
    """One worker in this process; a handle is the array itself.

    `threads` is set for the whole process (`torch.set_num_threads`): sums differ between thread
    counts.
    """

    collective = False
    workers = None

    def __init__(self, factory: WorkerFactory, *, threads: int = 1, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self._worker = factory(device)

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        """See Transport.run; the worker's own exceptions are the only ones. Nobody waits here:
        `meanwhile` is called first.
        """
        meanwhile()
        started = time.monotonic()
        shared = _read_only(broadcast)
        replies, total, reduce_s = [], TreeSum(len(calls)), 0.0
        summed = any(call.summed for call in calls)
        for i, call in enumerate(calls):
            results = self._worker.execute(call.request, shared, *map(_read_only, call.states))
            reply, *arrays = checked_returns(results, call.returns, summed)
            if summed:
                adding = time.monotonic()
                total.add(i, arrays.pop(0))
                reduce_s += time.monotonic() - adding
            replies.append(ShardReply(reply, tuple(arrays)))
        compute_s = time.monotonic() - started - reduce_s
        return Round(replies, 0.0, compute_s, reduce_s, total.total if summed else None)

    def run_together(
        self, broadcast: np.ndarray, request: JointRequest, shards: int
    ) -> tuple[Any, Resident]:
        raise NotImplementedError("one worker has nobody to run with")

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        return [_read_only(handle) for handle in handles]

    def guard(self, save: Callable[[], None]) -> None:
        pass

    def show(self, run: str, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _read_only(array: np.ndarray) -> np.ndarray:
    # As the object store would give it: a worker that writes into its arguments fails here too, not
    # only on a cluster.
    view = array.view()
    view.flags.writeable = False
    return view
