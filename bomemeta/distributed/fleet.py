"""The workers of the ray transport: started, watched, killed and replaced, and more or fewer of
them as the cluster has room.

Everything here moves a `Slot` from one phase to the next; `slots.py` says which phases there are
and how a worker is lost.
"""

from __future__ import annotations

import re
import sys
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
    UnserializableException,
    WorkerCrashedError,
)

from bomemeta.distributed import capacity, cluster
from bomemeta.distributed.actor import (
    LATE,
    actor_class,
    birth_of,
    crash_on,
    kill_on_its_node,
    kill_process,
)
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.losses import (
    LOGS,
    MAX_STRIKES,
    WorkerCrashed,
    WorkerHung,
    WorkerLost,
    WorkerUnavailable,
    WorkerUnplaced,
    loss_of,
    not_brought_here,
)
from bomemeta.distributed.slots import Phase, Slot, Slots
from bomemeta.distributed.transport import WorkerFactory
from bomemeta.errors import ClusterError, ClusterLost

# Until Ray notices that a node is gone (measured: 13 s) it may place actors there; it is asked
# again after this pause.
UNPLACED_PAUSE_S = 1.0
# How often the cluster is asked whether an absent worker has room now. The question costs some
# milliseconds.
ROOM_EVERY_S = 2.0
# A worker that could not be started is tried again after this, for as long as others do the work.
GIVEN_UP_S = 60.0

# What a worker has for its start at least, however long Ray itself took.
LEAST_START_S = 30.0
PID = re.compile(r"\bpid: (\d+)")  # in Ray's account of a dead actor

EventSink = Callable[[str], None]


class Fleet(Slots):
    """The slots of a transport. Driver's thread only, but for `start` and `end`.

    Attributes:
        replacements: workers that were lost and replaced so far.
    """

    def __init__(
        self,
        factory: WorkerFactory,
        options: RayOptions,
        on_event: EventSink,
        role: str = "worker",
    ) -> None:
        super().__init__(options.workers, role)
        self.replacements = 0
        self.options = options
        self._factory = cloudpickle.dumps(factory)
        self._on_event = on_event
        self._forgotten: list[Any] = []  # references whose answer nobody wants
        self._lost_since = 0  # since a round was finished
        self._looked_at = 0.0  # when the cluster was last asked for room
        self._asked_autoscaler = False

    @property
    def alive(self) -> int:
        """How many workers are built and, as far as is known, there."""
        return sum(len(self.in_phase(each)) for each in (Phase.IDLE, Phase.BUSY, Phase.DRAINING))

    def start(self, deadline: float) -> None:
        """Begins to start the workers, which have time until `deadline` (monotonic seconds).

        Raises ClusterError where the cluster has no room for them.
        """
        options = self.options
        if options.elastic and capacity.room(options) < options.workers:
            self._asked_autoscaler = True
            capacity.ask_autoscaler(options, options.workers)
        capacity.check_capacity(options, self._on_event)
        self._looked_at = time.monotonic()
        for slot in self.slots[: capacity.room(options)] if options.elastic else self.slots:
            self._begin_start(slot)
            self.hasten(slot, max(deadline - time.monotonic(), LEAST_START_S))

    def grow(self) -> None:
        """Starts workers that are absent, where the cluster has room for them by now."""
        if not self.in_phase(Phase.ABSENT) or time.monotonic() - self._looked_at < ROOM_EVERY_S:
            return
        absent = [
            slot
            for slot in self.in_phase(Phase.ABSENT).values()
            if time.monotonic() >= slot.absent_until
        ]
        if not absent or self.silent():
            return
        self._looked_at = time.monotonic()
        for slot in absent[: capacity.room(self.options)]:
            self._on_event(f"the cluster has room for {slot} now; it is starting")
            self._begin_start(slot)

    def wait_for_room(self) -> None:
        if not self.options.elastic:
            raise ClusterLost("no worker is left; see the events above for how they were lost")
        deadline = time.monotonic() + self.options.start_timeout_s
        self._on_event("no worker has room in the cluster; waiting for some")
        while not self.in_phase(Phase.STARTING):
            if time.monotonic() > deadline:
                capacity.check_capacity(self.options)  # says what is wanted and what there is
                raise ClusterLost(
                    f"no worker could be placed within start_timeout_s = {self.options.start_timeout_s:g} s"
                )
            self.check()
            time.sleep(ROOM_EVERY_S)
            for slot in self.slots:
                slot.absent_until = 0.0
            self.grow()

    def settle(self, slot: Slot, overdue: bool) -> None:
        """An answer that is no job's: the worker is built, or has done with a call that nobody
        waits for.
        """
        if slot.phase is Phase.STARTING:
            try:
                slot.process = self.get(slot, overdue)
            except WorkerLost as loss:
                self._start_failed(slot, loss, overdue)
                return
            slot.failed_starts = 0
        else:
            try:
                self.get(slot, overdue)
            except WorkerUnavailable as loss:
                self.await_return(slot, loss, "between two shards")
                return
            except WorkerLost as loss:
                self.replace(slot, loss, "between two shards")
                return
            except Exception:  # of a call whose round was given up for the first such exception
                pass
        slot.unreached = 0
        self.rest(slot, Phase.IDLE)

    def _start_failed(self, slot: Slot, loss: WorkerLost, overdue: bool) -> None:
        if isinstance(loss, WorkerUnplaced):
            self._place_again(slot, loss)
            return
        loss = self.judged(slot, loss)
        slot.failed_starts += isinstance(loss, WorkerCrashed)
        # Of the first try: all tries together have start_timeout_s.
        left_s = self._deadlines[slot.index] - time.monotonic()
        if overdue or left_s < 0 or slot.failed_starts == MAX_STRIKES:
            self._give_up(slot, loss)
        else:
            self.replace(slot, loss, "while it started")
            self.hasten(slot, left_s)

    def get(self, slot: Slot, overdue: bool) -> Any:
        """What the slot's actor answered.

        Raises WorkerLost, ObjectLostError, or the worker's own exception with its own type; its
        traceback over there is the `__cause__`.
        """
        if overdue:
            limit = (
                self.options.start_timeout_s
                if slot.phase is Phase.STARTING
                else self.options.step_timeout_s
            )
            raise WorkerHung(f"did not answer within {limit:g} s")
        try:
            return ray.get(slot.refs[0], timeout=self.options.step_timeout_s)
        except RayTaskError as error:
            if type(error.cause) is RayError:  # what Ray puts there where it cannot pickle it
                raise not_brought_here(error) from error
            raise error.cause from error
        except UnserializableException as error:
            raise not_brought_here(error) from error
        except ObjectLostError:
            raise
        except GetTimeoutError as error:
            raise WorkerHung("has an answer that does not arrive") from error
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            raise loss_of(error, slot.phase is Phase.STARTING) from error
        except RayError as error:
            raise ClusterError(f"Ray itself failed: {error}") from error

    def judged(self, slot: Slot, loss: WorkerLost, far: bool = False) -> WorkerLost:
        """The loss, or WorkerCrashed where the worker's log has a crash of its own. `far`: another
        node is asked too, which may take seconds.
        """
        found = PID.search(str(loss.__cause__))
        if type(loss) is not WorkerLost or found is None:
            return loss
        own = ray.get_runtime_context().get_node_id()
        node = slot.process.node_id if slot.process is not None else own
        how = crash_on(node, int(found[1])) if far or node == own else None
        return loss if how is None else WorkerCrashed(f"crashed ({how})")

    def progress(self) -> None:
        """A round was finished: what was lost before it counts no more."""
        self._lost_since = 0

    def replace(self, slot: Slot, loss: WorkerLost, when: str) -> None:
        """Kills what is left of the slot's worker and starts another; where there is no room for
        one now, as soon as there is.

        Raises ClusterLost after `max_replacements` without a finished round.
        """
        what = f"{slot} {loss} {when}"
        node_id = slot.process.node_id if slot.process is not None else None
        self._kill(slot, isinstance(loss, WorkerHung))
        self.replacements += 1
        self._lost_since += 1
        if self._lost_since > self.options.max_replacements:
            raise ClusterLost(
                f"{self._lost_since} workers were lost in the same round, max_replacements is {self.options.max_replacements}; the last: "
                f"{what}{loss.advice}. Look for what kills them (memory, a failing node) and resume from the last checkpoint"
            )
        if self.options.elastic and (self.silent() or capacity.room(self.options) < 1):
            self._on_event(
                f"{what}; a replacement starts when the cluster has room for it{loss.advice}"
            )
        else:
            self._on_event(f"{what}; a replacement is starting{loss.advice}")
            self._begin_start(slot)
        # What took this worker may have taken idle ones of its node too. To find that out by giving
        # them shards would count against the shards.
        for idle in list(self.in_phase(Phase.IDLE).values()):
            if idle.process is not None and node_id in (None, idle.process.node_id):
                self._ask(idle)

    def await_return(self, slot: Slot, loss: WorkerUnavailable, when: str) -> None:
        """A worker that could not be reached may be as well as before: it is asked for a sign of
        life, and replaced only where none comes.
        """
        slot.unreached += 1
        if slot.unreached > MAX_STRIKES:
            self.replace(slot, loss, when)
            return
        self._on_event(f"{slot} {loss} {when}; it is asked for a sign of life")
        self._forgotten += slot.refs + slot.next_refs
        slot.job, slot.next_job, slot.next_refs = -1, -1, []
        self._ask(slot)

    def _ask(self, slot: Slot) -> None:
        ping = [slot.actor.ping.remote()]
        self.watch(slot, Phase.DRAINING, ping, self.options.step_timeout_s)

    def drain(self, slot: Slot) -> None:
        """Nobody wants the answers that the slot is busy with."""
        self.take_back(slot)
        left_s = self._deadlines[slot.index] - time.monotonic()
        self.watch(slot, Phase.DRAINING, slot.refs, left_s)

    def take_back(self, slot: Slot) -> None:
        """The slot is not to do what was given to it beforehand. If it has begun, the answer is not
        heard.
        """
        if slot.next_refs:
            ray.cancel(slot.next_refs[0])
            self._forgotten += slot.next_refs
        slot.next_job, slot.next_refs = -1, []

    def proceed(self, slot: Slot) -> None:
        """The slot's answer was heard: it continues with what was given to it beforehand, or is idle."""
        if not slot.next_refs:
            self.rest(slot, Phase.IDLE)
            return
        slot.job, refs, slot.begun = slot.next_job, slot.next_refs, time.monotonic()
        slot.next_job, slot.next_refs = -1, []
        self.watch(slot, Phase.BUSY, refs, self.options.step_timeout_s)

    def end(self) -> None:
        """Kills the workers, and waits until those of this node are gone."""
        processes = [slot.process for slot in self.slots if slot.process is not None]
        for slot in self.slots:
            if slot.phase is not Phase.ABSENT:
                self._forgotten += slot.refs + slot.next_refs
                self.rest(slot, Phase.ABSENT)
                slot.next_refs, slot.process = [], None
                ray.kill(slot.actor, no_restart=True)
        if self._asked_autoscaler:
            capacity.ask_autoscaler(self.options, 0)
        own_node = ray.get_runtime_context().get_node_id()
        here = [process for process in processes if process.node_id == own_node]
        deadline = time.monotonic() + 2.0  # a sound worker is gone within 0.1 s of ray.kill
        while time.monotonic() < deadline and any(
            birth_of(process.pid) == process.birth for process in here
        ):
            time.sleep(0.02)
        for process in here:
            kill_process(process)
        self.collect_forgotten()

    def collect_forgotten(self) -> None:
        """Looks at each forgotten answer once, or Ray prints an "Unhandled error" for it."""
        if self._forgotten:
            ready, self._forgotten = ray.wait(
                self._forgotten, num_returns=len(self._forgotten), timeout=0
            )
            for ref in ready:
                with suppress(Exception):
                    ray.get(ref, timeout=0)

    def build(self, slot: Slot) -> Any:
        """Has the slot's actor make its worker."""
        paths = cluster.importable_paths()
        late = [name for name in LATE if name in sys.modules]
        return slot.actor.build.remote(self._factory, self.options.threads, paths, late)

    def _begin_start(self, slot: Slot) -> None:
        options = self.options
        made = actor_class(
            options.cpus_per_worker,
            options.gpus_per_worker,
            capacity.scheduling_strategy(),
            options.worker_labels,
        )
        slot.actor, slot.process = made.remote(), None
        slot.unreached = 0
        self.watch(slot, Phase.STARTING, [self.build(slot)], options.start_timeout_s)

    def _place_again(self, slot: Slot, loss: WorkerUnplaced) -> None:
        # Of the first try: all tries together have start_timeout_s.
        left_s = self._deadlines[slot.index] - time.monotonic()
        if left_s < 0:
            self._give_up(slot, loss)
            return
        self._kill(slot, hung=False)
        time.sleep(UNPLACED_PAUSE_S)
        if self.options.elastic and capacity.room(self.options) < 1:
            return
        self._begin_start(slot)
        self.hasten(slot, left_s)

    def _give_up(self, slot: Slot, loss: WorkerLost) -> None:
        self._kill(slot, isinstance(loss, WorkerHung))
        slot.failed_starts, slot.absent_until = 0, time.monotonic() + GIVEN_UP_S
        if len(self.in_phase(Phase.ABSENT)) == len(self.slots):
            error = ClusterError if isinstance(loss, WorkerCrashed) else ClusterLost
            raise error(
                f"no worker could be started; the last one {loss}{loss.advice}. Free are {ray.available_resources().get('CPU', 0):g} "
                f"CPU, a worker takes {self.options.cpus_per_worker:g}; start_timeout_s is "
                f"{self.options.start_timeout_s:g}. {LOGS}"
            )
        self._on_event(
            f"{slot} could not be started: it {loss}; the other workers continue without it{loss.advice}"
        )

    def _kill(self, slot: Slot, hung: bool) -> None:
        """The slot is absent from now on."""
        self._forgotten += slot.refs + slot.next_refs
        self.rest(slot, Phase.ABSENT)
        slot.next_refs, slot.next_job = [], -1
        with suppress(
            RayError
        ):  # an actor that never got as far as to be known cannot be killed, and need not be
            ray.kill(slot.actor, no_restart=True)
        # A stopped process does not act on ray.kill: it would keep its CPUs, and the replacement
        # could never be placed.
        if hung and slot.process is not None:
            self._forgotten += kill_on_its_node(slot.process)
        slot.process = None
