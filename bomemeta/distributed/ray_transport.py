"""The transport over Ray actors: stateless workers that may die or hang at any time without
changing an answer.

A round (`RayRound`) is a `Plan` of jobs: calls and, where shards are added on the workers, merges.
The `Fleet` has the workers, one `Slot` each; jobs are given to slots and their answers heard.

Actors have `max_restarts=0, max_task_retries=0`: Ray repeats nothing by itself. What a call needs
comes with the call, so a lost call is run again on any other worker. An answer is known by its
reference: once a slot has let go of a reference, an answer that still arrives on it is never looked
at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from bomemeta.distributed import cluster, node
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.fleet import EventSink, Fleet
from bomemeta.distributed.gauges import Gauges
from bomemeta.distributed.head import HeadWatch
from bomemeta.distributed.losses import state_lost
from bomemeta.distributed.ray_round import RayRound
from bomemeta.distributed.resident import GONE, Resident
from bomemeta.distributed.scheduler import Scheduler
from bomemeta.distributed.slots import Phase
from bomemeta.distributed.transport import Handle, Round, ShardCall, WorkerFactory, nothing
from bomemeta.errors import ClusterError, LowerStateLost

# How long a cluster of ours whose head is gone is waited for at the end.
LEAVE_S = 5.0
# Ray makes no smaller object store.
SMALLEST_STORE = 75 * 2**20


class RayTransport:
    """Runs shards on actors: `options.workers` of them, or as many as the cluster has room for. The
    constructor returns at once; the first `run` waits for a worker.

    Raises, in `run`, `fetch` or `wait_ready`:
        ClusterError: no room for the workers, or a shard crashes every worker that tries it.
        ClusterLost: no cluster, no worker starts, or more were lost than can be replaced.
        HeadLost: the cluster's head is gone; the transport cannot be used again.
        LowerStateLost: a handle's array was on a node that is gone.
    """

    def __init__(
        self,
        factory: WorkerFactory,
        options: RayOptions,
        on_event: EventSink = lambda line: None,
        fleet: Fleet | None = None,
    ) -> None:
        self._options = options
        self._on_event = on_event
        # One deadline over the cluster's start and the workers'.
        self._start_by = time.monotonic() + options.start_timeout_s
        self._fleet = fleet or Fleet(factory, options, on_event)
        self._scheduler = Scheduler()
        self._collective: Any = None
        self._gauges = Gauges()
        self._largest, self._spills = 0, False  # bytes sent so far; whether that was noted
        self._head: HeadWatch | None = None
        self._save: Callable[[], None] = nothing
        self._opened, self._closing = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._joined = ExitStack()
        self._keeper: threading.Thread | None = None
        if cluster.must_start(options):
            # A thread for the cluster's whole life, see cluster.local; starting takes about 10 s,
            # in which data can load.
            self._keeper = threading.Thread(
                target=self._keep_local, name="bomemeta-ray", daemon=True
            )
            self._keeper.start()
        else:
            self._joined.enter_context(cluster.joined(options))
            try:
                self._fleet.start(self._start_by)
            except BaseException:
                self._joined.close()
                raise
            self._watch_head()
            self._opened.set()

    @property
    def replacements(self) -> int:
        """How many workers were lost and replaced so far."""
        return self._fleet.replacements

    @property
    def workers(self) -> tuple[int, int]:
        """How many workers are alive, and the most that there may be."""
        return len(self.worker_pids()), self._options.workers

    @property
    def collective(self) -> bool:
        """Whether kernels of a shared lower problem run on the workers together (`run_together`)."""
        return self._options.reduce == "collective"

    def wait_ready(self) -> None:
        """Waits until the cluster is up and its workers are being built. Raises ClusterError where
        it cannot be had.
        """
        if self._closing.is_set():
            raise ClusterError("this ray transport is closed; make a new one")
        self._opened.wait()
        if self._failure is not None:
            raise self._failure

    def worker_pids(self) -> list[int]:
        """The processes of the workers that have started, on whatever node; for tests that kill
        one.
        """
        return [slot.process.pid for slot in self._fleet.slots if slot.process is not None]

    def worker_nodes(self) -> list[str]:
        """The nodes of the workers that have started, in the order of `worker_pids`."""
        return [slot.process.node_id for slot in self._fleet.slots if slot.process is not None]

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        """See Transport.run. A busy worker is watched for `step_timeout_s` from when it was given
        its call.
        """
        self.wait_ready()
        self._fleet.collect_forgotten()
        self._fleet.grow()
        started = time.monotonic()
        self._note_spilling(broadcast.nbytes)
        shared = cluster.outgoing(broadcast, len(calls))
        sent = time.monotonic()
        running = RayRound(self._fleet.options, self._fleet, self._scheduler, calls, shared)
        try:
            running.give_out(())
            meanwhile()
            while (total := running.finish()) is None:
                running.advance()
        except (
            BaseException
        ):  # KeyboardInterrupt too: the next run must not take an old answer for a new one
            for slot in list(self._fleet.in_phase(Phase.BUSY).values()):
                self._fleet.drain(slot)
            raise
        self._fleet.progress()
        replies = [running.plan.answers[number] for number in range(len(calls))]
        compute_s = time.monotonic() - sent - running.reduce_s
        summed = total if any(call.summed for call in calls) else None
        return Round(
            replies, sent - started, compute_s, running.reduce_s, summed, running.driver_bytes
        )

    def run_together(
        self, broadcast: np.ndarray, request: Any, shards: int
    ) -> tuple[Any, Resident]:
        """See `collective.Collective.run`."""
        self.wait_ready()
        self._fleet.collect_forgotten()
        self._fleet.grow()
        if self._collective is None:
            from bomemeta.distributed.collective import (
                Collective,  # torch's distributed part, for those who use it
            )

            self._collective = Collective(self._fleet)
        self._note_spilling(broadcast.nbytes)
        answer: tuple[Any, Resident] = self._collective.run(broadcast, request, shards)
        self._fleet.progress()
        return answer

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        """See Transport.fetch; waits `step_timeout_s` at most."""
        self.wait_ready()
        refs = [handle for handle in handles if isinstance(handle, ray.ObjectRef)]
        try:
            arrays = iter(ray.get(refs, timeout=self._options.step_timeout_s))
        except ObjectLostError as error:
            raise LowerStateLost(state_lost(error)) from error
        except GetTimeoutError as error:
            raise ClusterError(
                f"{len(refs)} lower states did not arrive in {self._options.step_timeout_s:g} s"
            ) from error
        found = [
            next(arrays) if isinstance(handle, ray.ObjectRef) else handle for handle in handles
        ]
        return [
            self._resident(handle) if isinstance(handle, Resident) else handle for handle in found
        ]

    def _resident(self, handle: Resident) -> np.ndarray:
        if self._collective is None:
            raise LowerStateLost(GONE)
        array: np.ndarray = self._collective.fetch(handle)
        return array

    def close(self) -> None:
        """Ends our workers, and the cluster where this transport started it. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._keeper is not None:
            # Ray cannot take leave of a head that is gone.
            self._keeper.join(LEAVE_S if self._head is not None and self._head.lost else None)
        elif self._leave():
            self._joined.close()

    def guard(self, save: Callable[[], None]) -> None:
        """See Transport.guard: called where the cluster's head does not answer."""
        self._save = save

    def show(self, run: str, metrics: Mapping[str, float]) -> None:
        """See Transport.show; the workers' numbers are added."""
        here = {"workers_alive": float(self._fleet.alive)}
        self._gauges.show(run, {**metrics, **here}, self._fleet.replacements)

    def _note_spilling(self, size: int) -> None:
        """Says once that what is sent each round is larger than the object store. Each size is
        looked up once.
        """
        if size <= max(self._largest, SMALLEST_STORE):
            return
        self._largest = size
        if size > (store := cluster.store_bytes()) and not self._spills:
            self._spills = True
            self._on_event(
                f"x has {size / 2**30:.2f} GiB and the object store of this node {store / 2**30:.2f}: it spills to the disk in every "
                "round, which is slow. More for the store: --object-store-memory of `ray start`, or a larger /dev/shm"
            )

    def _watch_head(self) -> None:
        address = ray.get_runtime_context().gcs_address
        self._head = HeadWatch(address, self._on_event, lambda: self._save())
        self._fleet.check, self._fleet.silent = self._head.check, self._head.silent

    def _check_own(self) -> None:
        assert self._head is not None
        self._head.check()
        node.check_own_node()

    def _leave(self) -> bool:
        """Ends our workers; False where the cluster cannot be spoken to."""
        if self._head is not None:
            self._head.end()
            if self._head.lost:
                return False
        self._fleet.end()
        return True

    def _keep_local(self) -> None:
        try:
            with cluster.local(self._options, self._on_event, self._start_by):
                self._fleet.start(self._start_by)
                self._watch_head()
                self._fleet.check = self._check_own
                self._opened.set()
                self._closing.wait()
                self._leave()
        except BaseException as error:
            self._failure = error
        finally:
            self._opened.set()
