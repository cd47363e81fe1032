"""The transport over Ray actors: stateless workers that may die or hang at any time without changing an answer.

A round is a `Plan` of jobs: calls and, where shards are added on the workers, merges. The `Fleet` has the workers, one `Seat` each.
Everything below gives jobs to seats and hears their answers.

Actors have `max_restarts=0, max_task_retries=0`: Ray repeats nothing by itself. What a call needs comes with the call,
so a lost call is run again on any other worker. An answer is known by its reference: once a seat has let go of a
reference, an answer that still arrives on it is never looked at.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.fleet import EventSink, Fleet
from bomemeta.distributed.pace import Key, Pace
from bomemeta.distributed.plan import Plan
from bomemeta.distributed.seats import MAX_STRIKES, Phase, Seat, WorkerLost, poison, state_lost
from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import Handle, Round, ShardCall, ShardReply, WorkerFactory
from bomemeta.errors import ClusterError, LowerStateLost


class RayTransport:
    """Runs shards on actors: `options.workers` of them, or as many as the cluster has room for. The constructor returns at once; the first
    `run` waits for a worker.

    Raises, in `run`, `fetch` or `wait_ready`:
        ClusterError: no room for the workers, no worker starts, or more were lost than can be replaced.
        LowerStateLost: a handle's array was on a node that is gone.
    """

    def __init__(self, factory: WorkerFactory, options: RayOptions, on_event: EventSink = lambda line: None) -> None:
        self._options = options
        self._on_event = on_event
        self._fleet = Fleet(factory, options, on_event)
        self._pace = Pace()
        self._collective: Any = None
        self._opened, self._closing = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._joined = ExitStack()
        self._keeper: threading.Thread | None = None
        if cluster.must_start(options):
            # A thread for the cluster's whole life, see cluster.local; starting takes about 10 s, in which data can load.
            self._keeper = threading.Thread(target=self._keep_local, name="bomemeta-ray", daemon=True)
            self._keeper.start()
        else:
            self._joined.enter_context(cluster.joined(options))
            try:
                self._fleet.start()
            except BaseException:
                self._joined.close()
                raise
            self._opened.set()

    @property
    def replacements(self) -> int:
        """How many workers were lost and replaced so far."""
        return self._fleet.replacements

    @property
    def collective(self) -> bool:
        """Whether kernels of a shared lower problem run on the workers together (`run_together`)."""
        return self._options.reduce == "collective"

    def wait_ready(self) -> None:
        """Waits until the cluster is up and its workers are being built. Raises ClusterError where it cannot be had."""
        if self._closing.is_set():
            raise ClusterError("this ray transport is closed; make a new one")
        self._opened.wait()
        if self._failure is not None:
            raise self._failure

    def worker_pids(self) -> list[int]:
        """The processes of the workers that have started, on whatever node; for tests that kill one."""
        return [seat.process.pid for seat in self._fleet.seats if seat.process is not None]

    def worker_nodes(self) -> list[str]:
        """The nodes of the workers that have started, in the order of `worker_pids`."""
        return [seat.process.node_id for seat in self._fleet.seats if seat.process is not None]

    def run(self, broadcast: np.ndarray, calls: Sequence[ShardCall]) -> Round:
        """See Transport.run. A busy worker is watched for `step_timeout_s` from when it was given its call."""
        self.wait_ready()
        self._fleet.collect_forgotten()
        self._fleet.grow()
        started = time.monotonic()
        shared = ray.put(broadcast)
        sent = time.monotonic()
        running = _Round(self._options, self._fleet, self._pace, calls, shared)
        try:
            while (total := running.finish()) is None:
                running.advance()
        except BaseException:  # KeyboardInterrupt too: the next run must not take an old answer for a new one
            for seat in self._fleet.in_phase(Phase.BUSY):
                self._fleet.drain(seat)
            raise
        replies = [running.plan.answers[number] for number in range(len(calls))]
        compute_s = time.monotonic() - sent - running.reduce_s
        summed = total if any(call.summed for call in calls) else None
        return Round(replies, sent - started, compute_s, running.reduce_s, summed, running.driver_bytes)

    def run_together(self, broadcast: np.ndarray, request: Any, shards: int) -> Any:
        """See `collective.Collective.run`."""
        self.wait_ready()
        self._fleet.collect_forgotten()
        self._fleet.grow()
        if self._collective is None:
            from bomemeta.distributed.collective import Collective  # torch's distributed part, for those who use it

            self._collective = Collective(self._fleet)
        return self._collective.run(broadcast, request, shards)

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        """See Transport.fetch; waits `step_timeout_s` at most."""
        self.wait_ready()
        refs = [handle for handle in handles if isinstance(handle, ray.ObjectRef)]
        try:
            arrays = iter(ray.get(refs, timeout=self._options.step_timeout_s))
        except ObjectLostError as error:
            raise LowerStateLost(state_lost(error)) from error
        except GetTimeoutError as error:
            raise ClusterError(f"{len(refs)} lower states did not arrive in {self._options.step_timeout_s:g} s") from error
        return [next(arrays) if isinstance(handle, ray.ObjectRef) else handle for handle in handles]

    def close(self) -> None:
        """Ends our workers, and the cluster where this transport started it. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._keeper is not None:
            self._keeper.join()
        else:
            self._fleet.end()
            self._joined.close()

    def _keep_local(self) -> None:
        try:
            with cluster.local(self._options, self._on_event):
                self._fleet.start()
                self._opened.set()
                self._closing.wait()
                self._fleet.end()
        except BaseException as error:
            self._failure = error
        finally:
            self._opened.set()


class _Round:
    """One round on its way: jobs are given out, answers heard, shares added."""

    def __init__(self, options: RayOptions, fleet: Fleet, pace: Pace, calls: Sequence[ShardCall], shared: Any) -> None:
        self._options, self._fleet, self._pace, self._calls, self._shared = options, fleet, pace, calls, shared
        summed = any(call.summed for call in calls)
        self._form = "plain" if not summed else "apart" if options.reduce != "driver" and len(calls) > 1 else "whole"
        self.plan = Plan(len(calls), merged=self._form == "apart")
        self.reduce_s, self.driver_bytes = 0.0, 0
        self._sum = TreeSum(len(calls))
        self._strikes: Counter[int] = Counter()
        self._made_by: dict[int, int] = {}  # whose node a share is on, by job
        self._used: set[int] = set()

    def finish(self) -> np.ndarray | None:
        """The round's sum, or an empty array where there is nothing to add; None: it goes on."""
        if not self.plan.finished:
            return None
        self._pace.fade([seat.index for seat in self._fleet.seats if seat.index not in self._used])
        if self._form == "plain":
            return np.empty(0)
        start = time.monotonic()
        if self._form == "apart":
            try:
                total: np.ndarray = ray.get(self.plan.held[self.plan.root], timeout=self._options.step_timeout_s)
            except (ObjectLostError, GetTimeoutError):
                self.plan.lost(self.plan.root)
                return None
            self.driver_bytes = total.nbytes
        else:
            total = self._sum.total
        self.reduce_s += time.monotonic() - start
        return total

    def advance(self) -> None:
        """Gives out what can be given out, and hears one seat."""
        self._give_out()
        found = self._fleet.next_seat(self._backup_time())
        if found is None:
            self._back_up()
            return
        seat, overdue = found
        if seat.phase is not Phase.BUSY:
            self._fleet.settle(seat, overdue)
            if seat.phase is Phase.STARTING:
                self._pace.forget(seat.index)
            return
        try:
            self._hear(seat, overdue)
        except WorkerLost as loss:
            self._lose(seat, loss)

    def _give_out(self) -> None:
        idle = {seat.index: seat for seat in self._fleet.in_phase(Phase.IDLE)}
        for job in [job for job in self.plan.ready if self.plan.merge(job)]:
            if not idle:
                return
            near = [index for index in map(self._made_by.get, self.plan.merge(job) or ()) if index in idle]
            self._begin(idle.pop(near[0] if near else next(iter(idle))), job)
        keys = {self._key(job): job for job in self.plan.ready if not self.plan.merge(job)}
        if idle and keys:
            now = time.monotonic()
            busy = {seat.index: self._remaining_s(seat, now) for seat in self._fleet.in_phase(Phase.BUSY)}
            for worker, key in self._pace.assign(list(idle), list(keys), busy):
                self._begin(idle[worker], keys[key])

    def _begin(self, seat: Seat, job: int) -> None:
        if job in self.plan.ready:
            self.plan.ready.remove(job)
        merge = self.plan.merge(job)
        if merge is not None:
            seat.refs = [seat.actor.merge.remote(self.plan.held[merge.left], self.plan.held[merge.right])]
        else:
            call = self._calls[job]
            returns = 1 + (self._form == "apart") + call.returns
            method = seat.actor.execute.options(num_returns=returns)
            refs = method.remote(call.request, call.returns, self._form, self._shared, *call.states)
            seat.refs = refs if returns > 1 else [refs]
        seat.phase, seat.job, seat.begun = Phase.BUSY, job, time.monotonic()
        seat.deadline = seat.begun + self._options.step_timeout_s
        self._used.add(seat.index)

    def _hear(self, seat: Seat, overdue: bool) -> None:
        job = seat.job
        merge = self.plan.merge(job)
        try:
            answer = self._fleet.get(seat, overdue)
        except ObjectLostError as error:
            lost = error.object_ref_hex
            if merge is not None:
                sides = [side for side in (merge.left, merge.right) if self.plan.held[side].hex() == lost]
                if sides:
                    seat.phase, seat.refs = Phase.IDLE, []
                    self.plan.lost(sides[0])
                    return
            elif any(isinstance(state, ray.ObjectRef) and state.hex() == lost for state in self._calls[job].states):
                raise LowerStateLost(state_lost(error)) from error
            raise WorkerLost("answered, but its node was lost with the answer") from error
        share, states = None, seat.refs[1:]
        if merge is not None:
            share = seat.refs[0]
        else:
            self._pace.learn(seat.index, self._key(job), time.monotonic() - seat.begun)
            if self._form == "apart":
                share, *states = states
            elif self._form == "whole":
                answer, own = answer
                start = time.monotonic()
                self._sum.add(job, own)
                self.driver_bytes += own.nbytes
                self.reduce_s += time.monotonic() - start
            self.plan.answers[job] = ShardReply(answer, tuple(states))
        self._made_by[job] = seat.index
        self.plan.done(job, share)
        seat.phase, seat.refs = Phase.IDLE, []
        for other in self._at(job):  # a backup that came second
            self._fleet.drain(other)

    def _lose(self, seat: Seat, loss: WorkerLost) -> None:
        job = seat.job
        what = "a sum of shards" if self.plan.merge(job) else f"shard {job}"
        self._strikes[job] += 1
        self._pace.forget(seat.index)
        seat.job = -1
        if self._strikes[job] == MAX_STRIKES:
            self._fleet.replace(seat, loss, f"in {what}")
            raise ClusterError(poison(what, loss, self._options)) from None
        if not self._at(job):
            self.plan.again(job)
        self._fleet.replace(seat, loss, f"in {what}, which runs again on the next free worker")

    # Backups: the slowest call given out twice.

    def _backup_time(self) -> float | None:
        """When the first of the calls that run alone has taken too long, if a worker is free to run it a second time."""
        if self._options.backup_after is None or self.plan.ready or not self._fleet.in_phase(Phase.IDLE):
            return None
        return min((when for _, when in self._late()), default=None)

    def _back_up(self) -> None:
        idle, now = self._fleet.in_phase(Phase.IDLE), time.monotonic()
        late = sorted((when, seat.job) for seat, when in self._late() if when <= now)
        for seat, (_, job) in zip(sorted(idle, key=lambda seat: self._pace.slowness(seat.index)), late, strict=False):
            self._begin(seat, job)

    def _late(self) -> list[tuple[Seat, float]]:
        found = []
        for seat in self._fleet.in_phase(Phase.BUSY):
            expected = self._pace.expected(self._key(seat.job))
            if expected is not None and self.plan.merge(seat.job) is None and len(self._at(seat.job)) == 1:
                found.append((seat, seat.begun + (self._options.backup_after or 1.0) * expected))
        return found

    def _at(self, job: int) -> list[Seat]:
        return [seat for seat in self._fleet.in_phase(Phase.BUSY) if seat.job == job]

    def _remaining_s(self, seat: Seat, now: float) -> float:
        expected = self._pace.expected(self._key(seat.job)) or 0.0
        return max(expected * self._pace.slowness(seat.index) - (now - seat.begun), 0.0)

    def _key(self, job: int) -> Key:
        kind = self._calls[job].kind if job < len(self._calls) else "sum of shards"
        return Key(kind, len(self._calls), job)
