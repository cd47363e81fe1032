"""The workers of the ray transport: started, watched, killed and replaced, and more or fewer of
them as the cluster has room.

Everything here moves a `Slot` from one phase to the next; `slots.py` says which phases there are
and how a worker is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import (
    ActorUnavailableError,
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
from bomemeta.distributed.actor import actor_class, birth_of, kill_on_its_node, kill_process
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.slots import (
    LOGS,
    MAX_STRIKES,
    Phase,
    Slot,
    WorkerHung,
    WorkerLost,
    WorkerUnavailable,
    WorkerUnplaced,
    last_line,
)
from bomemeta.distributed.soonest import Soonest
from bomemeta.distributed.transport import WorkerFactory
from bomemeta.errors import ClusterError

# Until Ray notices that a node is gone (measured: 13 s) it may place actors there; it is asked
# again after this pause.
UNPLACED_PAUSE_S = 1.0
# How often the cluster is asked whether an absent worker has room now. The question costs some
# milliseconds.
ROOM_EVERY_S = 2.0
# A worker that could not be started is tried again after this, for as long as others do the work.
GIVEN_UP_S = 60.0

EventSink = Callable[[str], None]


class Fleet:
    """The slots of a transport. Driver's thread only, but for `start` and `end`.

    Attributes:
        replacements: workers that were lost and replaced so far.
    """

    def __init__(self, factory: WorkerFactory, options: RayOptions, on_event: EventSink) -> None:
        self.replacements = 0
        self.options = options
        self._factory = cloudpickle.dumps(factory)
        self._on_event = on_event
        self.slots = [Slot(index) for index in range(options.workers)]
        # What is looked up for every answer, so that no answer costs a walk over all slots.
        self._phases: dict[Phase, dict[int, Slot]] = {phase: {} for phase in Phase}
        self._phases[Phase.ABSENT] = {slot.index: slot for slot in self.slots}
        self._watched: dict[Any, Slot] = {}  # by the first of the references
        self._deadlines: Soonest[int] = Soonest()  # by slot, monotonic seconds
        self._forgotten: list[Any] = []  # references whose answer nobody wants
        self._looked_at = 0.0  # when the cluster was last asked for room
        self._asked_autoscaler = False

    def in_phase(self, phase: Phase) -> dict[int, Slot]:
        """The slots in a phase, by number, in the order in which they came to it. Changes as they
        do.
        """
        return self._phases[phase]

    @property
    def waiting(self) -> bool:
        """Whether there is anybody to wait for."""
        return bool(self._watched)

    def watch(self, slot: Slot, phase: Phase, refs: list[Any], within_s: float) -> None:
        """The slot's actor is to answer within so many seconds."""
        self._move(slot, phase)
        slot.refs = refs
        self._watched[refs[0]] = slot
        self._deadlines.set(slot.index, time.monotonic() + within_s)

    def hasten(self, slot: Slot, within_s: float) -> None:
        """The slot's actor has so many seconds left at most."""
        end = time.monotonic() + within_s
        if slot.index in self._deadlines and end < self._deadlines[slot.index]:
            self._deadlines.set(slot.index, end)

    def rest(self, slot: Slot, phase: Phase) -> None:
        """Nothing is expected of the slot: it is idle, or absent."""
        self._move(slot, phase)
        slot.refs = []

    def _move(self, slot: Slot, phase: Phase) -> None:
        if slot.refs:
            self._watched.pop(slot.refs[0], None)
        self._deadlines.drop(slot.index)
        del self._phases[slot.phase][slot.index]
        self._phases[phase][slot.index] = slot
        slot.phase = phase

    def start(self) -> None:
        """Begins to start the workers. Raises ClusterError where the cluster has no room for them."""
        options = self.options
        if options.elastic and cluster.room(options) < options.workers:
            self._asked_autoscaler = True
            cluster.ask_autoscaler(options, options.workers)
        cluster.check_capacity(options, self._on_event)
        self._looked_at = time.monotonic()
        for slot in self.slots[: cluster.room(options)] if options.elastic else self.slots:
            self._begin_start(slot)

    def grow(self) -> None:
        """Starts workers that are absent, where the cluster has room for them by now."""
        absent = [
            slot
            for slot in self.in_phase(Phase.ABSENT).values()
            if time.monotonic() >= slot.absent_until
        ]
        if not absent or time.monotonic() - self._looked_at < ROOM_EVERY_S:
            return
        self._looked_at = time.monotonic()
        for slot in absent[: cluster.room(self.options)]:
            self._on_event(f"the cluster has room for {slot} now; it is starting")
            self._begin_start(slot)

    def heard(self, until: float | None = None) -> Iterator[tuple[Slot, bool]]:
        """Every slot that has an answer by now (False); where there is none, waits for the first,
        or gives the first slot whose time is over (True). Nothing at `until` (monotonic seconds).

        Each is to be dealt with before the next is taken. Raises ClusterError where there is nobody
        to wait for.
        """
        earliest = self._deadlines.least()
        if earliest is None:
            self._wait_for_room()
            return
        end = earliest[0] if until is None else min(until, earliest[0])
        refs = list(self._watched)
        ready, _ = ray.wait(refs, num_returns=1, timeout=max(0.0, end - time.monotonic()))
        if ready and len(refs) > 1:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in ready:
            if (slot := self._watched.get(ref)) is not None:
                yield slot, False
        if not ready and end == earliest[0]:
            yield self.slots[earliest[1]], True

    def _wait_for_room(self) -> None:
        if not self.options.elastic:
            raise ClusterError("no worker is left; see the events above for how they were lost")
        deadline = time.monotonic() + self.options.start_timeout_s
        self._on_event("no worker has room in the cluster; waiting for some")
        while not self.in_phase(Phase.STARTING):
            if time.monotonic() > deadline:
                cluster.check_capacity(self.options)  # says what is wanted and what there is
                raise ClusterError(
                    f"no worker could be placed within start_timeout_s = {self.options.start_timeout_s:g} s"
                )
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
            except WorkerUnplaced as loss:
                self._place_again(slot, loss)
                return
            except WorkerLost as loss:
                slot.failed_starts += 1
                if overdue or slot.failed_starts == MAX_STRIKES:
                    self._give_up(slot, loss)
                else:
                    self.replace(slot, loss, "while it started")
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
            raise error.cause from error
        except ObjectLostError:
            raise
        except GetTimeoutError as error:
            raise WorkerHung("has an answer that does not arrive") from error
        except ActorUnavailableError as error:
            raise WorkerUnavailable(f"could not be reached ({last_line(error)})") from error
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            # Ray has no class of its own for this; should the words change, it counts as a failed
            # start.
            lost = (
                WorkerUnplaced
                if slot.phase is Phase.STARTING and "never ran" in str(error)
                else WorkerLost
            )
            raise lost(f"died ({last_line(error)})") from error
        except RayError as error:
            raise ClusterError(f"Ray itself failed: {error}") from error

    def replace(self, slot: Slot, loss: WorkerLost, when: str) -> None:
        """Kills what is left of the slot's worker and starts another; where there is no room for
        one now, as soon as there is.

        Raises ClusterError after `max_replacements`.
        """
        what = f"{slot} {loss} {when}"
        node_id = slot.process.node_id if slot.process is not None else None
        self._kill(slot, isinstance(loss, WorkerHung))
        self.replacements += 1
        if self.replacements > self.options.max_replacements:
            raise ClusterError(
                f"{self.replacements} workers were lost, max_replacements is {self.options.max_replacements}; the last: "
                f"{what}. Look for what kills them (memory, a failing node) and resume from the last checkpoint"
            )
        if self.options.elastic and cluster.room(self.options) < 1:
            self._on_event(f"{what}; a replacement starts when the cluster has room for it")
        else:
            self._on_event(f"{what}; a replacement is starting")
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
        """The slot's answer was heard: it goes on with what was given to it beforehand, or is idle."""
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
            cluster.ask_autoscaler(self.options, 0)
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

    def _begin_start(self, slot: Slot) -> None:
        options = self.options
        made = actor_class(
            options.cpus_per_worker, options.gpus_per_worker, cluster.scheduling_strategy()
        )
        slot.actor, slot.process = made.remote(), None
        slot.unreached = 0
        built = slot.actor.build.remote(self._factory, options.threads, cluster.importable_paths())
        self.watch(slot, Phase.STARTING, [built], options.start_timeout_s)

    def _place_again(self, slot: Slot, loss: WorkerUnplaced) -> None:
        # Of the first try: all tries together have start_timeout_s.
        left_s = self._deadlines[slot.index] - time.monotonic()
        if left_s < 0:
            self._give_up(slot, loss)
            return
        self._kill(slot, hung=False)
        time.sleep(UNPLACED_PAUSE_S)
        if self.options.elastic and cluster.room(self.options) < 1:
            return
        self._begin_start(slot)
        self.hasten(slot, left_s)

    def _give_up(self, slot: Slot, loss: WorkerLost) -> None:
        self._kill(slot, isinstance(loss, WorkerHung))
        slot.failed_starts, slot.absent_until = 0, time.monotonic() + GIVEN_UP_S
        if len(self.in_phase(Phase.ABSENT)) == len(self.slots):
            raise ClusterError(
                f"no worker could be started; the last one {loss}. Free are {ray.available_resources().get('CPU', 0):g} "
                f"CPU, a worker takes {self.options.cpus_per_worker:g}; start_timeout_s is "
                f"{self.options.start_timeout_s:g}. {LOGS}"
            )
        self._on_event(
            f"{slot} could not be started: it {loss}; the other workers go on without it"
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
