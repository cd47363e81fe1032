"""The transport over Ray actors: stateless workers that may die or hang at any time without changing an answer.

The driver keeps one `Seat` per worker; `seats.py` says what phases a seat goes through and how a worker is lost. Everything below is
about moving seats from one phase to the next.

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

from bomemeta.distributed import cluster
from bomemeta.distributed.actor import ShardActor, birth_of, kill_on_its_node, kill_process
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.seats import (
    LOGS,
    MAX_STRIKES,
    WAITING,
    Phase,
    Seat,
    WorkerHung,
    WorkerLost,
    WorkerUnplaced,
    last_line,
    poison,
    state_lost,
)
from bomemeta.distributed.transport import Handle, Round, ShardCall, ShardReply, WorkerFactory
from bomemeta.errors import ClusterError, LowerStateLost

# Until Ray notices that a node is gone (measured: 13 s) it may place actors there; it is asked again after this pause.
UNPLACED_PAUSE_S = 1.0

EventSink = Callable[[str], None]


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
        self._seats = [Seat(index) for index in range(options.workers)]
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
                    if waiting and seat.phase is Phase.IDLE:
                        self._dispatch(seat, waiting.popleft(), calls, shared)
                seat, overdue = self._next_seat()
                if seat.phase is not Phase.BUSY:
                    self._settle(seat, overdue)
                    continue
                shard = seat.shard
                try:
                    answers[shard] = self._answer(seat, calls[shard], overdue)
                except WorkerLost as loss:
                    strikes[shard] += 1
                    if strikes[shard] == MAX_STRIKES:
                        self._replace(seat, loss, f"in shard {shard}")
                        raise ClusterError(poison(shard, loss, self._options)) from None
                    waiting.appendleft(shard)
                    self._replace(seat, loss, f"in shard {shard}, which runs again on the next free worker")
                else:
                    seat.phase, seat.refs = Phase.IDLE, []
        except BaseException:  # KeyboardInterrupt too: the next run must not take an old answer for a new one
            for seat in self._seats:
                if seat.phase is Phase.BUSY:
                    seat.phase = Phase.DRAINING
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
            self._end_workers()
            self._joined.close()

    # Seats, from one phase to the next.

    def _begin_start(self, seat: Seat) -> None:
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
        seat.phase, seat.deadline = Phase.STARTING, time.monotonic() + options.start_timeout_s

    def _dispatch(self, seat: Seat, shard: int, calls: Sequence[ShardCall], shared: Any) -> None:
        call = calls[shard]
        method = seat.actor.execute.options(num_returns=1 + call.returns)
        refs = method.remote(call.request, call.returns, shared, *call.states)
        seat.refs = refs if call.returns else [refs]
        seat.phase, seat.shard = Phase.BUSY, shard
        seat.deadline = time.monotonic() + self._options.step_timeout_s

    def _next_seat(self) -> tuple[Seat, bool]:
        """The first seat with an answer (False), or the first whose time is over (True)."""
        watched = {seat.refs[0]: seat for seat in self._seats if seat.phase in WAITING}
        if not watched:
            raise ClusterError("no worker is left; see the events above for how they were lost")
        earliest = min(watched.values(), key=lambda seat: seat.deadline)
        ready, _ = ray.wait(list(watched), num_returns=1, timeout=max(0.0, earliest.deadline - time.monotonic()))
        return (watched[ready[0]], False) if ready else (earliest, True)

    def _answer(self, seat: Seat, call: ShardCall, overdue: bool) -> ShardReply:
        try:
            reply = self._get(seat, overdue)
        except ObjectLostError as error:
            lost = error.object_ref_hex
            if any(isinstance(state, ray.ObjectRef) and state.hex() == lost for state in call.states):
                raise LowerStateLost(state_lost(error)) from error
            raise WorkerLost("answered, but its node was lost with the answer") from error
        return ShardReply(reply, tuple(seat.refs[1:]))

    def _settle(self, seat: Seat, overdue: bool) -> None:
        """An answer that is no shard's: the worker is built, or has done with a call that nobody waits for."""
        if seat.phase is Phase.STARTING:
            try:
                seat.process = self._get(seat, overdue)
            except WorkerUnplaced as loss:
                self._place_again(seat, loss)
                return
            except WorkerLost as loss:
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
            except WorkerLost as loss:
                self._replace(seat, loss, "between two shards")
                return
            except Exception:  # of a call whose round was given up for the first such exception
                pass
        seat.phase, seat.refs = Phase.IDLE, []

    def _place_again(self, seat: Seat, loss: WorkerUnplaced) -> None:
        deadline = seat.deadline  # of the first try: all tries together have start_timeout_s
        if time.monotonic() > deadline:
            self._give_up(seat, loss)
            return
        self._kill(seat, hung=False)
        time.sleep(UNPLACED_PAUSE_S)
        self._begin_start(seat)
        seat.deadline = deadline

    def _get(self, seat: Seat, overdue: bool) -> Any:
        """What the seat's actor answered.

        Raises WorkerLost, ObjectLostError, or the worker's own exception with its own type; its traceback over there is
        the `__cause__`.
        """
        if overdue:
            limit = self._options.start_timeout_s if seat.phase is Phase.STARTING else self._options.step_timeout_s
            raise WorkerHung(f"did not answer within {limit:g} s")
        try:
            return ray.get(seat.refs[0], timeout=self._options.step_timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except ObjectLostError:
            raise
        except GetTimeoutError as error:
            raise WorkerHung("has an answer that does not arrive") from error
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            # Ray has no class of its own for this; should the words change, it counts as a failed start.
            lost = WorkerUnplaced if seat.phase is Phase.STARTING and "never ran" in str(error) else WorkerLost
            raise lost(f"died ({last_line(error)})") from error
        except RayError as error:
            raise ClusterError(f"Ray itself failed: {error}") from error

    def _replace(self, seat: Seat, loss: WorkerLost, when: str) -> None:
        what = f"{seat} {loss} {when}"
        self._on_event(f"{what}; a replacement is starting")
        self._kill(seat, isinstance(loss, WorkerHung))
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
            if idle.phase is Phase.IDLE:
                idle.refs, idle.phase = [idle.actor.ping.remote()], Phase.DRAINING
                idle.deadline = time.monotonic() + self._options.step_timeout_s

    def _give_up(self, seat: Seat, loss: WorkerLost) -> None:
        self._kill(seat, isinstance(loss, WorkerHung))
        seat.phase = Phase.ABSENT
        if all(other.phase is Phase.ABSENT for other in self._seats):
            raise ClusterError(
                f"no worker could be started; the last one {loss}. Free are {ray.available_resources().get('CPU', 0):g} "
                f"CPU, a worker takes {self._options.cpus_per_worker:g}; start_timeout_s is "
                f"{self._options.start_timeout_s:g}. {LOGS}"
            )
        self._on_event(f"{seat} could not be started: it {loss}; the other workers go on without it")

    def _kill(self, seat: Seat, hung: bool) -> None:
        self._forgotten += seat.refs
        seat.refs = []
        with suppress(RayError):  # an actor that never got as far as to be known cannot be killed, and need not be
            ray.kill(seat.actor, no_restart=True)
        # A stopped process does not act on ray.kill: it would keep its CPUs, and the replacement could never be placed.
        if hung and seat.process is not None:
            self._forgotten += kill_on_its_node(seat.process)
        seat.process = None

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
            if seat.phase is not Phase.ABSENT:
                self._forgotten += seat.refs
                seat.phase, seat.refs, seat.process = Phase.ABSENT, [], None
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
