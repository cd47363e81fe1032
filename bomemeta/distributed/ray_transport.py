"""The transport over Ray actors: stateless workers that may die or hang at any time without changing an answer.

The driver keeps one `_Seat` per worker. A seat is in one of five phases, and everything below is about moving it from
one to the next:

    STARTING --built--> IDLE --dispatch--> BUSY --answer--> IDLE
        |                |                   |
        |                +--ping--> DRAINING |     DRAINING: still at a call whose answer nobody wants
        |                                    |
        +--died or overdue, in any phase: the actor is killed and the seat is STARTING with a new one
        +--did not start MAX_STRIKES times, or not in time: ABSENT, the others do the work

Actors have `max_restarts=0, max_task_retries=0`: Ray repeats nothing by itself. What a call needs comes with the call,
so a lost call is run again on any other worker. An answer is known by its reference: once a seat has let go of a
reference, an answer that still arrives on it is never looked at.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bomemeta.distributed import cluster
from bomemeta.distributed.actor import Process, ShardActor, birth_of, kill_process
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.transport import Handle, Round, ShardCall, ShardReply, WorkerFactory
from bomemeta.errors import ClusterError, LowerStateLost

__all__ = ["RayOptions", "RayTransport"]

# A shard that took this many workers down in a row, or a worker that died this often while it started, is to blame itself.
MAX_STRIKES = 3

EventSink = Callable[[str], None]


class _Phase(Enum):
    STARTING = auto()
    IDLE = auto()
    BUSY = auto()
    DRAINING = auto()
    ABSENT = auto()


_WAITING = (_Phase.STARTING, _Phase.BUSY, _Phase.DRAINING)


@dataclass
class _Seat:
    index: int
    phase: _Phase = _Phase.ABSENT
    actor: Any = None
    process: Process | None = None  # None until the worker is built
    refs: list[Any] = field(default_factory=list)  # what the seat's actor will answer; all are ready when the first is
    deadline: float = 0.0  # monotonic, seconds
    shard: int = -1  # while BUSY
    failed_starts: int = 0

    def __str__(self) -> str:
        return f"worker {self.index}" + (f" (pid {self.process.pid})" if self.process else "")


class _WorkerLost(Exception):
    """A worker's death, in words that follow the worker's name; never leaves this module."""


class _WorkerHung(_WorkerLost):
    """Its process may still be there and must be killed."""


class RayTransport:
    """Runs shards on `options.workers` actors. The constructor returns at once; the first `run` waits for a worker.

    Attributes:
        replacements: workers that were lost and replaced so far.

    Raises, in `run`, `fetch` or `wait_ready`:
        ClusterError: no room for the workers, no worker starts, or more were lost than can be replaced.
        LowerStateLost: a handle's array was on a node that is gone.
    """

    def __init__(self, factory: WorkerFactory, options: RayOptions, on_event: EventSink = lambda line: None) -> None:
        self.replacements = 0
        self._factory = cloudpickle.dumps(factory)
        self._options = options
        self._on_event = on_event
        self._seats = [_Seat(index) for index in range(options.workers)]
        self._forgotten: list[Any] = []  # references whose answer nobody wants
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
                self._start_workers()
            except BaseException:
                self._joined.close()
                raise
            self._opened.set()

    def wait_ready(self) -> None:
        """Waits until the cluster is up and its workers are being built. Raises ClusterError where it cannot be had."""
        if self._closing.is_set():
            raise ClusterError("this ray transport is closed; make a new one")
        self._opened.wait()
        if self._failure is not None:
            raise self._failure

    def worker_pids(self) -> list[int]:
        """The processes of the workers that have started, on whatever node; for tests that kill one."""
        return [seat.process.pid for seat in self._seats if seat.process is not None]

    def run(self, broadcast: np.ndarray, calls: Sequence[ShardCall]) -> Round:
        """See Transport.run. A busy seat is watched for `step_timeout_s` from the dispatch of its call."""
        self.wait_ready()
        self._collect_forgotten()
        started = time.monotonic()
        shared = ray.put(broadcast)
        sent = time.monotonic()
        waiting = deque(range(len(calls)))
        answers: dict[int, ShardReply] = {}
        strikes = [0] * len(calls)
        try:
            while len(answers) < len(calls):
                for seat in self._seats:
                    if waiting and seat.phase is _Phase.IDLE:
                        self._dispatch(seat, waiting.popleft(), calls, shared)
                seat, overdue = self._next_seat()
                if seat.phase is not _Phase.BUSY:
                    self._settle(seat, overdue)
                    continue
                shard = seat.shard
                try:
                    answers[shard] = self._answer(seat, calls[shard], overdue)
                except _WorkerLost as loss:
                    strikes[shard] += 1
                    if strikes[shard] == MAX_STRIKES:
                        self._replace(seat, loss, f"in shard {shard}")
                        raise ClusterError(_poison(shard, loss, self._options)) from None
                    waiting.appendleft(shard)
                    self._replace(seat, loss, f"in shard {shard}, which runs again on the next free worker")
                else:
                    seat.phase, seat.refs = _Phase.IDLE, []
        except BaseException:  # KeyboardInterrupt too: the next run must not take an old answer for a new one
            for seat in self._seats:
                if seat.phase is _Phase.BUSY:
                    seat.phase = _Phase.DRAINING
            raise
        replies = [answers[shard] for shard in range(len(calls))]
        return Round(replies, broadcast_s=sent - started, compute_s=time.monotonic() - sent)

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        """See Transport.fetch; waits `step_timeout_s` at most."""
        self.wait_ready()
        refs = [handle for handle in handles if isinstance(handle, ray.ObjectRef)]
        try:
            arrays = iter(ray.get(refs, timeout=self._options.step_timeout_s))
        except ObjectLostError as error:
            raise LowerStateLost(_state_lost(error)) from error
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
            self._end_workers()
            self._joined.close()

    # Seats, from one phase to the next.

    def _begin_start(self, seat: _Seat) -> None:
        options = self._options
        actor_class = ray.remote(
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=cluster.scheduling_strategy(),
        )(ShardActor)
        seat.actor, seat.process = actor_class.remote(), None
        seat.refs = [seat.actor.build.remote(self._factory, options.threads, cluster.importable_paths())]
        seat.phase, seat.deadline = _Phase.STARTING, time.monotonic() + options.start_timeout_s

    def _dispatch(self, seat: _Seat, shard: int, calls: Sequence[ShardCall], shared: Any) -> None:
        call = calls[shard]
        method = seat.actor.execute.options(num_returns=1 + call.returns)
        refs = method.remote(call.request, call.returns, shared, *call.states)
        seat.refs = refs if call.returns else [refs]
        seat.phase, seat.shard = _Phase.BUSY, shard
        seat.deadline = time.monotonic() + self._options.step_timeout_s

    def _next_seat(self) -> tuple[_Seat, bool]:
        """The first seat with an answer (False), or the first whose time is over (True)."""
        watched = {seat.refs[0]: seat for seat in self._seats if seat.phase in _WAITING}
        if not watched:
            raise ClusterError("no worker is left; see the events above for how they were lost")
        earliest = min(watched.values(), key=lambda seat: seat.deadline)
        ready, _ = ray.wait(list(watched), num_returns=1, timeout=max(0.0, earliest.deadline - time.monotonic()))
        return (watched[ready[0]], False) if ready else (earliest, True)

    def _answer(self, seat: _Seat, call: ShardCall, overdue: bool) -> ShardReply:
        try:
            reply = self._get(seat, overdue)
        except ObjectLostError as error:
            lost = error.object_ref_hex
            if any(isinstance(state, ray.ObjectRef) and state.hex() == lost for state in call.states):
                raise LowerStateLost(_state_lost(error)) from error
            raise _WorkerLost("answered, but its node was lost with the answer") from error
        return ShardReply(reply, tuple(seat.refs[1:]))

    def _settle(self, seat: _Seat, overdue: bool) -> None:
        """An answer that is no shard's: the worker is built, or has done with a call that nobody waits for."""
        if seat.phase is _Phase.STARTING:
            try:
                seat.process = self._get(seat, overdue)
            except _WorkerLost as loss:
                seat.failed_starts += 1
                if overdue or seat.failed_starts == MAX_STRIKES:
                    self._give_up(seat, loss)
                else:
                    self._replace(seat, loss, "while it started")
                return
            seat.failed_starts = 0
        else:
            try:
                self._get(seat, overdue)
            except _WorkerLost as loss:
                self._replace(seat, loss, "between two shards")
                return
            except Exception:  # of a call whose round was given up for the first such exception
                pass
        seat.phase, seat.refs = _Phase.IDLE, []

    def _get(self, seat: _Seat, overdue: bool) -> Any:
        """What the seat's actor answered.

        Raises _WorkerLost, ObjectLostError, or the worker's own exception with its own type; its traceback over there is
        the `__cause__`.
        """
        if overdue:
            limit = self._options.start_timeout_s if seat.phase is _Phase.STARTING else self._options.step_timeout_s
            raise _WorkerHung(f"did not answer within {limit:g} s")
        try:
            return ray.get(seat.refs[0], timeout=self._options.step_timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except ObjectLostError:
            raise
        except GetTimeoutError as error:
            raise _WorkerHung("has an answer that does not arrive") from error
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            raise _WorkerLost(f"died ({_last_line(error)})") from error
        except RayError as error:
            raise ClusterError(f"Ray itself failed: {error}") from error

    def _replace(self, seat: _Seat, loss: _WorkerLost, when: str) -> None:
        what = f"{seat} {loss} {when}"
        self._on_event(f"{what}; a replacement is starting")
        self._kill(seat, isinstance(loss, _WorkerHung))
        self.replacements += 1
        if self.replacements > self._options.max_replacements:
            raise ClusterError(
                f"{self.replacements} workers were lost, max_replacements is {self._options.max_replacements}; the last: "
                f"{what}. Look for what kills them (memory, a failing node) and resume from the last checkpoint"
            )
        self._begin_start(seat)
        # What took this worker may have taken idle ones too. To find that out by giving them shards would count against
        # the shards.
        for idle in self._seats:
            if idle.phase is _Phase.IDLE:
                idle.refs, idle.phase = [idle.actor.ping.remote()], _Phase.DRAINING
                idle.deadline = time.monotonic() + self._options.step_timeout_s

    def _give_up(self, seat: _Seat, loss: _WorkerLost) -> None:
        self._kill(seat, isinstance(loss, _WorkerHung))
        seat.phase = _Phase.ABSENT
        if all(other.phase is _Phase.ABSENT for other in self._seats):
            raise ClusterError(
                f"no worker could be started; the last one {loss}. Free are {ray.available_resources().get('CPU', 0):g} "
                f"CPU, a worker takes {self._options.cpus_per_worker:g}; start_timeout_s is "
                f"{self._options.start_timeout_s:g}. {_LOGS}"
            )
        self._on_event(f"{seat} could not be started: it {loss}; the other workers go on without it")

    def _kill(self, seat: _Seat, hung: bool) -> None:
        self._forgotten += seat.refs
        seat.refs = []
        ray.kill(seat.actor, no_restart=True)
        process, seat.process = seat.process, None
        if process is None or not hung:
            return
        # A stopped process does not act on ray.kill and Ray does not insist: it would keep its memory and its CPUs, and
        # the replacement could never be placed.
        if process.node_id == ray.get_runtime_context().get_node_id():
            kill_process(process)
        else:
            there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
            killer = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(kill_process)
            self._forgotten.append(killer.remote(process))

    # Opening and closing.

    def _keep_local(self) -> None:
        try:
            with cluster.local(self._options, self._on_event):
                self._start_workers()
                self._opened.set()
                self._closing.wait()
                self._end_workers()
        except BaseException as error:
            self._failure = error
        finally:
            self._opened.set()

    def _start_workers(self) -> None:
        cluster.check_capacity(self._options)
        for seat in self._seats:
            self._begin_start(seat)

    def _end_workers(self) -> None:
        processes = [seat.process for seat in self._seats if seat.process is not None]
        for seat in self._seats:
            if seat.phase is not _Phase.ABSENT:
                self._forgotten += seat.refs
                seat.phase, seat.refs, seat.process = _Phase.ABSENT, [], None
                ray.kill(seat.actor, no_restart=True)
        own_node = ray.get_runtime_context().get_node_id()
        here = [process for process in processes if process.node_id == own_node]
        deadline = time.monotonic() + 2.0  # a sound worker is gone within 0.1 s of ray.kill
        while time.monotonic() < deadline and any(birth_of(process.pid) == process.birth for process in here):
            time.sleep(0.02)
        for process in here:
            kill_process(process)
        self._collect_forgotten()

    def _collect_forgotten(self) -> None:
        """Looks at each forgotten answer once, or Ray prints an "Unhandled error" for it."""
        if self._forgotten:
            ready, self._forgotten = ray.wait(self._forgotten, num_returns=len(self._forgotten), timeout=0)
            for ref in ready:
                with suppress(Exception):
                    ray.get(ref, timeout=0)


_LOGS = "Ray's logs of it are in logs/worker-* of its session directory (/tmp/ray/session_latest unless set otherwise)"


def _poison(shard: int, loss: _WorkerLost, options: RayOptions) -> str:
    return (
        f"shard {shard} took {MAX_STRIKES} workers down in a row; the last one {loss}. If memory ran out: use more shards, "
        "so that each is smaller, or fewer workers. If it was a time-out: raise step_timeout_s "
        f"(now {options.step_timeout_s:g}). If it crashed (segmentation fault): workers=0 runs it here, where a debugger "
        f"can see it. {_LOGS}"
    )


def _state_lost(error: ObjectLostError) -> str:
    return f"lower state was lost with its node ({error.object_ref_hex}); go on from the last checkpoint"


def _last_line(error: BaseException) -> str:
    # Ray's messages are a screen long: the reason is in the last line, before advice of every kind.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(" Some common causes")[0].rstrip(".")[:300]
