"""One round over Ray: jobs are given to slots, answers heard, shares added. What is lost on the way
is done again.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.fleet import ROOM_EVERY_S, Fleet
from bomemeta.distributed.losses import (
    MAX_KILLS,
    MAX_STRIKES,
    WorkerCrashed,
    WorkerHung,
    WorkerLost,
    WorkerUnavailable,
    poison,
    state_lost,
)
from bomemeta.distributed.plan import Plan
from bomemeta.distributed.ready import Load, ReadyCalls
from bomemeta.distributed.scheduler import Key, Scheduler
from bomemeta.distributed.slots import Phase, Slot
from bomemeta.distributed.soonest import Soonest
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
    """One round on its way: jobs are given out, answers heard, shares added. An answer costs
    O(log W): nothing here walks over all slots or calls, but once for the round.
    """

    def __init__(
        self,
        options: RayOptions,
        fleet: Fleet,
        scheduler: Scheduler,
        calls: Sequence[ShardCall],
        shared: Any,
    ) -> None:
        self._options, self._fleet, self._scheduler = options, fleet, scheduler
        self._calls, self._shared = calls, shared
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
        self._strikes: Counter[int] = Counter()  # losses by the job's own fault, by job
        self._kills: Counter[int] = Counter()  # others
        self._made_by: dict[int, int] = {}  # whose node a share is on, by job
        self._used: set[int] = set()
        self._keys = [Key(call.kind, len(calls), job) for job, call in enumerate(calls)]
        self._ready = ReadyCalls(scheduler, self._keys)
        self.plan.calls.clear()
        self._anew = True  # whether there are calls that idle workers have not been asked for
        self._at: dict[int, list[Slot]] = {}  # who has a job in hand
        self._load = Load()  # kept where a worker is much slower than another
        self._loaded = scheduler.uneven
        # By slot, seconds of the monotonic clock. When it can be given another call beforehand, as
        # long as there are any:
        self._nearly: Soonest[int] = Soonest()
        # When the call that was given to it beforehand is better done by another:
        self._late_next: Soonest[int] = Soonest()
        # When the call that it has in hand is to be given out a second time:
        self._late: Soonest[int] = Soonest()

    def finish(self) -> np.ndarray | None:
        """The round's sum, or an empty array where there is nothing to add; None: it is not finished."""
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
        """Gives out what can be given out, and hears all who have answered by now."""
        self._fleet.grow()  # who joins in the middle of a long round is used in it
        heard = False
        for slot, overdue in self._fleet.heard(self._next_s()):
            heard = True
            if slot.phase is not Phase.BUSY:
                self._fleet.settle(slot, overdue)
                if slot.phase is Phase.STARTING:
                    self._scheduler.forget(slot.index)
            else:
                try:
                    self._hear(slot, overdue)
                except WorkerLost as loss:
                    self._lose(slot, loss)
            self.give_out((slot,))
        if not heard:
            self.give_out(())

    def give_out(self, fresh: Iterable[Slot]) -> None:
        """Gives to each slot what it can begin now, or as soon as it is done with what it has.

        `fresh`: who may have become idle. Others who are idle were asked before, and are asked again
        where calls have come back.
        """
        now = time.monotonic()
        idle = self._fleet.in_phase(Phase.IDLE)
        while self.plan.sums and idle:
            self._give_sum(idle, self.plan.sums.popleft())
        while self.plan.calls:
            self._give_back(self.plan.calls.popleft())
        if not self._ready:
            if not idle:
                return
            for index in self._late_next.until(now):
                self._take_back(self._fleet.slots[index])
            if not self._ready:
                self._back_up(now)
                return
        asked = list(idle) if self._anew else [s.index for s in fresh if s.phase is Phase.IDLE]
        self._anew = False
        self._match(asked, now)
        if self._ready:
            self._match(list(self._nearly.until(now + AHEAD_S / 2)), now)  # several at once

    def _give_sum(self, idle: dict[int, Slot], job: int) -> None:
        merge = self.plan.merge(job)
        assert merge is not None
        makers = (self._made_by.get(side) for side in (merge.left, merge.right))
        near = next((maker for maker in makers if maker in idle), None)
        self._begin(idle[near if near is not None else next(iter(idle))], job)

    def _match(self, free: Sequence[int], now: float) -> None:
        for worker, number in self._ready.match(free, self._load, now):
            self._begin(self._fleet.slots[worker], number)

    def _next_s(self) -> float | None:
        """When there will be something to give out, if nobody answers before."""
        if self._ready:
            waited = [self._nearly]
        elif self._fleet.in_phase(Phase.IDLE):
            waited = [self._late_next, self._late]
        else:
            waited = []
        times = [first[0] for each in waited if (first := each.least()) is not None]
        if self._ready and self._fleet.in_phase(Phase.ABSENT):
            times.append(time.monotonic() + ROOM_EVERY_S)
        return min(times, default=None)

    def _begin(self, slot: Slot, job: int) -> None:
        merge = self.plan.merge(job)
        if merge is not None:
            refs = [
                slot.actor.merge.remote(self.plan.held[merge.left], self.plan.held[merge.right])
            ]
        else:
            call = self._calls[job]
            returns = 1 + (self._form == "apart") + call.returns
            method = slot.actor.execute
            if returns > 1:
                method = method.options(num_returns=returns)
            answer = method.remote(
                call.request, call.returns, self._form, self._shared, *call.states
            )
            refs = answer if returns > 1 else [answer]
        slot.next_job, slot.next_refs = job, refs
        self._used.add(slot.index)
        if slot.phase is not Phase.BUSY:
            self._proceed(slot)
        else:
            self._nearly.drop(slot.index)
            expected, follows = self._expected_s(slot.job, slot), self._expected_s(job, slot)
            if expected is not None:
                self._late_next.set(slot.index, slot.begun + LATE * expected + AHEAD_S)
                self._set_load(slot, expected + (follows or 0.0))

    def _proceed(self, slot: Slot) -> None:
        """The slot continues with what was given to it beforehand, or is idle."""
        self._fleet.proceed(slot)
        if slot.phase is not Phase.BUSY:
            return
        self._at.setdefault(slot.job, []).append(slot)
        if (expected := self._expected_s(slot.job, slot)) is None:
            return
        if self._ready:
            self._nearly.set(slot.index, slot.begun + expected - AHEAD_S)
        self._set_load(slot, expected)
        if (after := self._options.backup_after) is not None and not self.plan.merge(slot.job):
            ordinary = expected / self._scheduler.slowness(slot.index)
            self._late.set(slot.index, slot.begun + after * ordinary)

    def _let_go(self, slot: Slot) -> None:
        """The slot has its job in hand no more."""
        there = self._at[slot.job]
        there.remove(slot)
        if not there:
            del self._at[slot.job]
        if self._loaded:
            self._load.drop(slot.index)
        for times in (self._nearly, self._late_next, self._late):
            times.drop(slot.index)

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
                    self._let_go(slot)
                    self._proceed(slot)
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
            self._scheduler.learn(slot.index, self._keys[job], time.monotonic() - slot.begun)
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
        self._let_go(slot)
        self._proceed(slot)
        for other in list(self._at.get(job, ())):  # a backup that came second
            if other.next_refs:
                self._take_back(other)
            self._let_go(other)
            self._fleet.drain(other)

    def _lose(self, slot: Slot, loss: WorkerLost) -> None:
        job, following = slot.job, slot.next_job
        what = "a sum of shards" if self.plan.merge(job) else f"shard {job}"
        again = f"in {what}, which runs again on the next free worker"
        self._let_go(slot)
        slot.job = -1
        if not isinstance(loss, WorkerUnavailable):
            loss = self._blamed(slot, job, loss)
            self._scheduler.forget(slot.index)
            own, kills = self._strikes[job], self._kills[job]
            if own >= MAX_STRIKES or kills == MAX_KILLS:
                self._fleet.replace(slot, loss, f"in {what}")
                raise ClusterError(poison(what, max(own, kills), loss, self._options)) from None
        if following >= 0:
            self.plan.again(following)
        if job not in self._at:
            self.plan.again(job)
        if isinstance(loss, WorkerUnavailable):
            self._fleet.await_return(slot, loss, again)
        else:
            self._fleet.replace(slot, loss, again)

    def _blamed(self, slot: Slot, job: int, loss: WorkerLost) -> WorkerLost:
        """Counts the loss: a crash or a hang against the job, a kill from outside apart, since it is
        no fault of what was computed. Other nodes are asked which of the two it was for every third
        of a job's losses.
        """
        self._kills[job] += 1
        far = self._kills[job] % MAX_STRIKES == 0
        loss = self._fleet.judged(slot, loss, far)
        if isinstance(loss, WorkerCrashed | WorkerHung):
            self._kills[job] -= 1
            self._strikes[job] += MAX_STRIKES if far else 1
        return loss

    def _give_back(self, number: int) -> None:
        if not self._ready:
            for slot in self._fleet.in_phase(Phase.BUSY).values():
                if not slot.next_refs and (expected := self._expected_s(slot.job, slot)):
                    self._nearly.set(slot.index, slot.begun + expected - AHEAD_S)
        self._ready.again(number)
        self._anew = True

    def _take_back(self, slot: Slot) -> None:
        self.plan.again(slot.next_job)
        self._fleet.take_back(slot)
        self._late_next.drop(slot.index)
        while self.plan.calls:
            self._give_back(self.plan.calls.popleft())

    def _back_up(self, now: float) -> None:
        """Gives idle workers the calls that take much longer than expected, to which no other slot
        has been put.
        """
        idle = self._fleet.in_phase(Phase.IDLE)
        while idle and (first := self._late.least()) is not None and first[0] <= now:
            (late,) = itertools.islice(self._late.until(now), 1)
            job = self._fleet.slots[late].job
            if len(self._at[job]) == 1:
                self._begin(idle[min(idle, key=self._scheduler.slowness)], job)

    def _set_load(self, slot: Slot, seconds: float) -> None:
        if self._loaded:
            slowness = self._scheduler.slowness(slot.index)
            self._load.set(slot.index, slot.begun + seconds, slowness)

    def _expected_s(self, job: int, slot: Slot) -> float | None:
        """What the job takes on this worker, as far as was known when the round began."""
        expected = self._ready.expected[job] if job < len(self._keys) else None
        return None if expected is None else expected * self._scheduler.slowness(slot.index)
