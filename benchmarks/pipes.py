"""A transport over plain processes and pipes: what dividing a step's work costs without Ray. It
survives nothing and watches nobody.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import (
    Handle,
    Round,
    ShardCall,
    ShardReply,
    WorkerFactory,
    nothing,
)


def _serve(pipe: Connection, factory: WorkerFactory) -> None:
    torch.set_num_threads(1)
    worker = factory("cpu")
    while message := pipe.recv_bytes():
        broadcast, calls = pickle.loads(message)
        answers = [(number, worker.execute(request, broadcast)) for number, request in calls]
        pipe.send_bytes(pickle.dumps(answers, protocol=5))


class PipeTransport:
    """For calls that are summed and keep nothing with the tasks. Each process has one part of a
    round's calls, sent as one message.
    """

    collective = False

    def __init__(self, factory: WorkerFactory, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, factory), daemon=True)
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        assert all(call.summed and not call.returns for call in calls), (
            "tasks that keep something are not for pipes"
        )
        started = time.monotonic()
        for pipe, part in zip(
            self._pipes, np.array_split(np.arange(len(calls)), len(self._pipes)), strict=True
        ):
            requests = [(int(number), calls[number].request) for number in part]
            pipe.send_bytes(pickle.dumps((broadcast, requests), protocol=5))
        meanwhile()
        total, replies, waiting = TreeSum(len(calls)), {}, set(self._pipes)
        while waiting:
            for pipe in wait(list(waiting)):
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                for number, (reply, share) in pickle.loads(pipe.recv_bytes()):
                    total.add(number, share)
                    replies[number] = ShardReply(reply, ())
        return Round(
            [replies[number] for number in range(len(calls))],
            0.0,
            time.monotonic() - started,
            0.0,
            total.total,
        )

    def run_together(self, broadcast: np.ndarray, request: Any, shards: int) -> tuple[Any, Any]:
        raise NotImplementedError("these processes know nothing of each other")

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        return list(handles)

    def guard(self, save: Callable[[], None]) -> None:
        pass

    def show(self, run: str, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send_bytes(b"")
            process.join()
