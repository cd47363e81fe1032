"""The workers of the ray transport: started, watched, killed and replaced, and more or fewer of them as the cluster has room.

Everything here moves a `Seat` from one phase to the next; `seats.py` says which phases there are and how a worker is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

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
)
from bomemeta.distributed.transport import WorkerFactory
from bomemeta.errors import ClusterError

# Until Ray notices that a node is gone (measured: 13 s) it may place actors there; it is asked again after this pause.
UNPLACED_PAUSE_S = 1.0
# How often the cluster is asked whether an absent worker has room now. The question costs some milliseconds.
ROOM_EVERY_S = 2.0
# A worker that could not be started is tried again after this, for as long as others do the work.
GIVEN_UP_S = 60.0

EventSink = Callable[[str], None]


class Fleet:
    """The seats of a transport. Driver's thread only, but for `start` and `end`.

    Attributes:
        replacements: workers that were lost and replaced so far.
    """

    def __init__(self, factory: WorkerFactory, options: RayOptions, on_event: EventSink) -> None:
        self.replacements = 0
        self.options = options
        self._factory = cloudpickle.dumps(factory)
        self._on_event = on_event
        self.seats = [Seat(index) for index in range(options.workers)]
        self._forgotten: list[Any] = []  # references whose answer nobody wants
        self._looked_at = 0.0  # when the cluster was last asked for room
        self._asked_autoscaler = False

    def in_phase(self, phase: Phase) -> list[Seat]:
        return [seat for seat in self.seats if seat.phase is phase]

    def start(self) -> None:
        """Begins to start the workers. Raises ClusterError where the cluster has no room for them."""
        options = self.options
        if options.elastic and cluster.room(options) < options.workers:
            self._asked_autoscaler = True
            cluster.ask_autoscaler(options, options.workers)
        cluster.check_capacity(options, self._on_event)
        self._looked_at = time.monotonic()
        for seat in self.seats[: cluster.room(options)] if options.elastic else self.seats:
            self._begin_start(seat)

    def grow(self) -> None:
        """Starts workers that are absent, where the cluster has room for them by now."""
        absent = [seat for seat in self.in_phase(Phase.ABSENT) if time.monotonic() >= seat.absent_until]
        if not absent or time.monotonic() - self._looked_at < ROOM_EVERY_S:
            return
        self._looked_at = time.monotonic()
        for seat in absent[: cluster.room(self.options)]:
            self._on_event(f"the cluster has room for {seat} now; it is starting")
            self._begin_start(seat)

    def next_seat(self, until: float | None = None) -> tuple[Seat, bool] | None:
        """The first seat with an answer (False), or the first whose time is over (True); None at `until` (monotonic seconds).

        Raises ClusterError where there is nobody to wait for.
        """
        watched = {seat.refs[0]: seat for seat in self.seats if seat.phase in WAITING}
        if not watched:
            self._wait_for_room()
            return None
        earliest = min(watched.values(), key=lambda seat: seat.deadline)
        end = earliest.deadline if until is None else min(until, earliest.deadline)
        ready, _ = ray.wait(list(watched), num_returns=1, timeout=max(0.0, end - time.monotonic()))
        if ready:
            return watched[ready[0]], False
        return (earliest, True) if end == earliest.deadline else None

    def _wait_for_room(self) -> None:
        if not self.options.elastic:
            raise ClusterError("no worker is left; see the events above for how they were lost")
        deadline = time.monotonic() + self.options.start_timeout_s
        self._on_event("no worker has room in the cluster; waiting for some")
        while not self.in_phase(Phase.STARTING):
            if time.monotonic() > deadline:
                cluster.check_capacity(self.options)  # says what is wanted and what there is
                raise ClusterError(f"no worker could be placed within start_timeout_s = {self.options.start_timeout_s:g} s")
            time.sleep(ROOM_EVERY_S)
            for seat in self.seats:
                seat.absent_until = 0.0
            self.grow()

    def settle(self, seat: Seat, overdue: bool) -> None:
        """An answer that is no job's: the worker is built, or has done with a call that nobody waits for."""
        if seat.phase is Phase.STARTING:
            try:
                seat.process = self.get(seat, overdue)
            except WorkerUnplaced as loss:
                self._place_again(seat, loss)
                return
            except WorkerLost as loss:
                seat.failed_starts += 1
                if overdue or seat.failed_starts == MAX_STRIKES:
                    self._give_up(seat, loss)
                else:
                    self.replace(seat, loss, "while it started")
                return
            seat.failed_starts = 0
        else:
            try:
                self.get(seat, overdue)
            except WorkerLost as loss:
                self.replace(seat, loss, "between two shards")
                return
            except Exception:  # of a call whose round was given up for the first such exception
                pass
        seat.phase, seat.refs = Phase.IDLE, []

    def get(self, seat: Seat, overdue: bool) -> Any:
        """What the seat's actor answered.

        Raises WorkerLost, ObjectLostError, or the worker's own exception with its own type; its traceback over there is
        the `__cause__`.
        """
        if overdue:
            limit = self.options.start_timeout_s if seat.phase is Phase.STARTING else self.options.step_timeout_s
            raise WorkerHung(f"did not answer within {limit:g} s")
        try:
            return ray.get(seat.refs[0], timeout=self.options.step_timeout_s)
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

    def replace(self, seat: Seat, loss: WorkerLost, when: str) -> None:
        """Kills what is left of the seat's worker and starts another; where there is no room for one now, as soon as there is.

        Raises ClusterError after `max_replacements`.
        """
        what = f"{seat} {loss} {when}"
        self._kill(seat, isinstance(loss, WorkerHung))
        self.replacements += 1
        if self.replacements > self.options.max_replacements:
            raise ClusterError(
                f"{self.replacements} workers were lost, max_replacements is {self.options.max_replacements}; the last: "
                f"{what}. Look for what kills them (memory, a failing node) and resume from the last checkpoint"
            )
        if self.options.elastic and cluster.room(self.options) < 1:
            self._on_event(f"{what}; a replacement starts when the cluster has room for it")
            seat.phase = Phase.ABSENT
        else:
            self._on_event(f"{what}; a replacement is starting")
            self._begin_start(seat)
        # What took this worker may have taken idle ones too. To find that out by giving them shards would count against
        # the shards.
        for idle in self.in_phase(Phase.IDLE):
            idle.refs, idle.phase = [idle.actor.ping.remote()], Phase.DRAINING
            idle.deadline = time.monotonic() + self.options.step_timeout_s

    def drain(self, seat: Seat) -> None:
        """Nobody wants the answers that the seat is busy with."""
        self.take_back(seat)
        seat.phase = Phase.DRAINING

    def take_back(self, seat: Seat) -> None:
        """The seat is not to do what was given to it beforehand. If it has begun, the answer is not heard."""
        if seat.next_refs:
            ray.cancel(seat.next_refs[0])
            self._forgotten += seat.next_refs
        seat.next_job, seat.next_refs = -1, []

    def proceed(self, seat: Seat) -> None:
        """The seat's answer was heard: it goes on with what was given to it beforehand, or is idle."""
        if not seat.next_refs:
            seat.phase, seat.refs = Phase.IDLE, []
            return
        seat.job, seat.refs, seat.begun = seat.next_job, seat.next_refs, time.monotonic()
        seat.deadline = seat.begun + self.options.step_timeout_s
        seat.next_job, seat.next_refs = -1, []

    def end(self) -> None:
        """Kills the workers, and waits until those of this node are gone."""
        processes = [seat.process for seat in self.seats if seat.process is not None]
        for seat in self.seats:
            if seat.phase is not Phase.ABSENT:
                self._forgotten += seat.refs + seat.next_refs
                seat.phase, seat.refs, seat.next_refs, seat.process = Phase.ABSENT, [], [], None
                ray.kill(seat.actor, no_restart=True)
        if self._asked_autoscaler:
            cluster.ask_autoscaler(self.options, 0)
        own_node = ray.get_runtime_context().get_node_id()
        here = [process for process in processes if process.node_id == own_node]
        deadline = time.monotonic() + 2.0  # a sound worker is gone within 0.1 s of ray.kill
        while time.monotonic() < deadline and any(birth_of(process.pid) == process.birth for process in here):
            time.sleep(0.02)
        for process in here:
            kill_process(process)
        self.collect_forgotten()

    def collect_forgotten(self) -> None:
        """Looks at each forgotten answer once, or Ray prints an "Unhandled error" for it."""
        if self._forgotten:
            ready, self._forgotten = ray.wait(self._forgotten, num_returns=len(self._forgotten), timeout=0)
            for ref in ready:
                with suppress(Exception):
                    ray.get(ref, timeout=0)

    def _begin_start(self, seat: Seat) -> None:
        options = self.options
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

    def _place_again(self, seat: Seat, loss: WorkerUnplaced) -> None:
        deadline = seat.deadline  # of the first try: all tries together have start_timeout_s
        if time.monotonic() > deadline:
            self._give_up(seat, loss)
            return
        self._kill(seat, hung=False)
        time.sleep(UNPLACED_PAUSE_S)
        if self.options.elastic and cluster.room(self.options) < 1:
            seat.phase = Phase.ABSENT
            return
        self._begin_start(seat)
        seat.deadline = deadline

    def _give_up(self, seat: Seat, loss: WorkerLost) -> None:
        self._kill(seat, isinstance(loss, WorkerHung))
        seat.phase, seat.failed_starts, seat.absent_until = Phase.ABSENT, 0, time.monotonic() + GIVEN_UP_S
        if all(other.phase is Phase.ABSENT for other in self.seats):
            raise ClusterError(
                f"no worker could be started; the last one {loss}. Free are {ray.available_resources().get('CPU', 0):g} "
                f"CPU, a worker takes {self.options.cpus_per_worker:g}; start_timeout_s is "
                f"{self.options.start_timeout_s:g}. {LOGS}"
            )
        self._on_event(f"{seat} could not be started: it {loss}; the other workers go on without it")

    def _kill(self, seat: Seat, hung: bool) -> None:
        self._forgotten += seat.refs + seat.next_refs
        seat.refs, seat.next_refs, seat.next_job = [], [], -1
        with suppress(RayError):  # an actor that never got as far as to be known cannot be killed, and need not be
            ray.kill(seat.actor, no_restart=True)
        # A stopped process does not act on ray.kill: it would keep its CPUs, and the replacement could never be placed.
        if hung and seat.process is not None:
            self._forgotten += kill_on_its_node(seat.process)
        seat.process = None
