"""One round over Ray: jobs are given to slots, answers heard, shares added. What is lost on the way
is done again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.fleet import Fleet
from bomemeta.distributed.plan import Plan
from bomemeta.distributed.scheduler import Key, Scheduler
from bomemeta.distributed.slots import (
    MAX_STRIKES,
    Phase,
    Slot,
    WorkerLost,
    WorkerUnavailable,
    poison,
    state_lost,
)
from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import ShardCall, ShardReply
from bomemeta.errors import ClusterError, LowerStateLost

# A worker is given its next call so long before it is expected to be done with the one in hand: the
# way from an answer to the start of another call takes some milliseconds, in which it would have
# nothing to do.
AHEAD_S = 0.01
# A call that was given beforehand is taken back for an idle worker when the one before it takes so
# many times as long as expected.
LATE = 2.0


class RayRound:
    """One round on its way: jobs are given out, answers heard, shares added."""

    def __init__(
        self,
        options: RayOptions,
        fleet: Fleet,
        pace: Scheduler,
        calls: Sequence[ShardCall],
        shared: Any,
    ) -> None:
        self._options, self._fleet, self._scheduler, self._calls, self._shared = (
            options,
            fleet,
            pace,
            calls,
            shared,
        )
        summed = any(call.summed for call in calls)
        self._form = (
            "plain"
            if not summed
            else "apart"
            if options.reduce != "driver" and len(calls) > 1
            else "whole"
        )
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
        self._scheduler.fade(
            [slot.index for slot in self._fleet.slots if slot.index not in self._used]
        )
        if self._form == "plain":
            return np.empty(0)
        start = time.monotonic()
        if self._form == "apart":
            try:
                total: np.ndarray = ray.get(
                    self.plan.held[self.plan.root], timeout=self._options.step_timeout_s
                )
            except (ObjectLostError, GetTimeoutError):
                self.plan.lost(self.plan.root)
                return None
            self.driver_bytes = total.nbytes
        else:
            total = self._sum.total
        self.reduce_s += time.monotonic() - start
        return total

    def advance(self) -> None:
        """Gives out what can be given out, and hears one slot."""
        self.give_out()
        found = self._fleet.next_slot(min(self._times(time.monotonic()), default=None))
        if found is None:
            return
        slot, overdue = found
        if slot.phase is not Phase.BUSY:
            self._fleet.settle(slot, overdue)
            if slot.phase is Phase.STARTING:
                self._scheduler.forget(slot.index)
            return
        try:
            self._hear(slot, overdue)
        except WorkerLost as loss:
            self._lose(slot, loss)

    def give_out(self) -> None:
        """Gives to each slot what it can begin now, or as soon as it is done with what it has."""
        now = time.monotonic()
        idle = {slot.index: slot for slot in self._fleet.in_phase(Phase.IDLE)}
        for job in [job for job in self.plan.ready if self.plan.merge(job)]:
            if not idle:
                return
            near = [
                index
                for index in map(self._made_by.get, self.plan.merge(job) or ())
                if index in idle
            ]
            self._begin(idle.pop(near[0] if near else next(iter(idle))), job)
        if idle and not self.plan.ready:
            self._take_back(now)
        self._assign(idle, now)
        self._assign({slot.index: slot for slot, when in self._nearly_done() if when <= now}, now)
        self._back_up(now)

    def _times(self, now: float) -> list[float]:
        """When there will be something to give out, if nobody answers before."""
        idle = self._fleet.in_phase(Phase.IDLE)
        times = self._nearly_done() if self.plan.ready else []
        times += self._late_ahead() if idle else []
        times += self._late() if idle else []
        return [when for _, when in times if when > now]

    def _assign(self, free: Mapping[int, Slot], now: float) -> None:
        keys = {self._key(job): job for job in self.plan.ready if not self.plan.merge(job)}
        if free and keys:
            busy = {
                slot.index: self._remaining_s(slot, now)
                for slot in self._fleet.in_phase(Phase.BUSY)
                if slot.index not in free
            }
            for worker, key in self._scheduler.assign(list(free), list(keys), busy):
                self._begin(free[worker], keys[key])

    def _begin(self, slot: Slot, job: int) -> None:
        if job in self.plan.ready:
            self.plan.ready.remove(job)
        merge = self.plan.merge(job)
        if merge is not None:
            refs = [
                slot.actor.merge.remote(self.plan.held[merge.left], self.plan.held[merge.right])
            ]
        else:
            call = self._calls[job]
            returns = 1 + (self._form == "apart") + call.returns
            method = slot.actor.execute.options(num_returns=returns)
            answer = method.remote(
                call.request, call.returns, self._form, self._shared, *call.states
            )
            refs = answer if returns > 1 else [answer]
        slot.next_job, slot.next_refs = job, refs
        if slot.phase is not Phase.BUSY:
            slot.phase = Phase.BUSY
            self._fleet.proceed(slot)
        self._used.add(slot.index)

    def _hear(self, slot: Slot, overdue: bool) -> None:
        job = slot.job
        merge = self.plan.merge(job)
        try:
            answer = self._fleet.get(slot, overdue)
        except ObjectLostError as error:
            lost = error.object_ref_hex
            if merge is not None:
                sides = [
                    side for side in (merge.left, merge.right) if self.plan.held[side].hex() == lost
                ]
                if sides:
                    self._fleet.proceed(slot)
                    self.plan.lost(sides[0])
                    return
            elif any(
                isinstance(state, ray.ObjectRef) and state.hex() == lost
                for state in self._calls[job].states
            ):
                raise LowerStateLost(state_lost(error)) from error
            raise WorkerLost("answered, but its node was lost with the answer") from error
        share, states = None, slot.refs[1:]
        if merge is not None:
            share = slot.refs[0]
        else:
            self._scheduler.learn(slot.index, self._key(job), time.monotonic() - slot.begun)
            if self._form == "apart":
                share, *states = states
            elif self._form == "whole":
                answer, own = answer
                start = time.monotonic()
                self._sum.add(job, own)
                self.driver_bytes += own.nbytes
                self.reduce_s += time.monotonic() - start
            self.plan.answers[job] = ShardReply(answer, tuple(states))
        self._made_by[job] = slot.index
        self.plan.done(job, share)
        self._fleet.proceed(slot)
        for other in self._at(job):  # a backup that came second
            if other.next_refs:
                self.plan.again(other.next_job)
            self._fleet.drain(other)

    def _lose(self, slot: Slot, loss: WorkerLost) -> None:
        job, following = slot.job, slot.next_job
        what = "a sum of shards" if self.plan.merge(job) else f"shard {job}"
        slot.job = -1
        if isinstance(loss, WorkerUnavailable):
            for lost in (following, job):
                if lost >= 0 and not self._at(lost):
                    self.plan.again(lost)
            again = f"in {what}, which runs again on the next free worker"
            self._fleet.await_return(slot, loss, again)
            return
        self._strikes[job] += 1
        self._scheduler.forget(slot.index)
        if self._strikes[job] == MAX_STRIKES:
            self._fleet.replace(slot, loss, f"in {what}")
            raise ClusterError(poison(what, loss, self._options)) from None
        if following >= 0:
            self.plan.again(following)
        if not self._at(job):
            self.plan.again(job)
        self._fleet.replace(slot, loss, f"in {what}, which runs again on the next free worker")

    # What is given out, or given to another, before an answer is there. Each returns the slots in
    # question, and from when on.

    def _nearly_done(self) -> list[tuple[Slot, float]]:
        """Seats that can be given another call beforehand."""
        return [
            (slot, slot.begun + expected - AHEAD_S)
            for slot in self._fleet.in_phase(Phase.BUSY)
            if not slot.next_refs and (expected := self._expected_s(slot)) is not None
        ]

    def _late_ahead(self) -> list[tuple[Slot, float]]:
        """Seats with a call given beforehand that is better done by another."""
        return [
            (slot, slot.begun + LATE * expected + AHEAD_S)
            for slot in self._fleet.in_phase(Phase.BUSY)
            if slot.next_refs and (expected := self._expected_s(slot)) is not None
        ]

    def _late(self) -> list[tuple[Slot, float]]:
        """Seats whose call, which no other slot has, is to be given out a second time."""
        if self._options.backup_after is None or self.plan.ready:
            return []
        return [
            (slot, slot.begun + self._options.backup_after * expected)
            for slot in self._fleet.in_phase(Phase.BUSY)
            if (expected := self._scheduler.expected(self._key(slot.job))) is not None
            and self.plan.merge(slot.job) is None
            and len(self._at(slot.job)) == 1
        ]

    def _take_back(self, now: float) -> None:
        for slot, when in self._late_ahead():
            if when <= now:
                self.plan.again(slot.next_job)
                self._fleet.take_back(slot)

    def _back_up(self, now: float) -> None:
        idle = sorted(
            self._fleet.in_phase(Phase.IDLE), key=lambda slot: self._scheduler.slowness(slot.index)
        )
        late = sorted((when, slot.job) for slot, when in self._late() if when <= now)
        for slot, (_, job) in zip(idle, late, strict=False):
            self._begin(slot, job)

    def _at(self, job: int) -> list[Slot]:
        return [slot for slot in self._fleet.in_phase(Phase.BUSY) if slot.job == job]

    def _remaining_s(self, slot: Slot, now: float) -> float:
        follows = self._scheduler.expected(self._key(slot.next_job)) if slot.next_refs else None
        after = (follows or 0.0) * self._scheduler.slowness(slot.index)
        return max((self._expected_s(slot) or 0.0) - (now - slot.begun), 0.0) + after

    def _expected_s(self, slot: Slot) -> float | None:
        """What the call in hand takes on this worker, as far as is known."""
        expected = self._scheduler.expected(self._key(slot.job))
        return None if expected is None else expected * self._scheduler.slowness(slot.index)

    def _key(self, job: int) -> Key:
        kind = self._calls[job].kind if job < len(self._calls) else "sum of shards"
        return Key(kind, len(self._calls), job)
