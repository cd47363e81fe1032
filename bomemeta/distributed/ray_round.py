"""One round over Ray: jobs are given to seats, answers heard, shares added. What is lost on the way is done again."""

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
from bomemeta.distributed.pace import Key, Pace
from bomemeta.distributed.plan import Plan
from bomemeta.distributed.seats import MAX_STRIKES, Phase, Seat, WorkerLost, poison, state_lost
from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import ShardCall, ShardReply
from bomemeta.errors import ClusterError, LowerStateLost

# A worker is given its next call so long before it is expected to be done with the one in hand: the way from an answer to the start of
# another call takes some milliseconds, in which it would have nothing to do.
AHEAD_S = 0.01
# A call that was given beforehand is taken back for an idle worker when the one before it takes so many times as long as expected.
LATE = 2.0


class RayRound:
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
        self.give_out()
        found = self._fleet.next_seat(min(self._times(time.monotonic()), default=None))
        if found is None:
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

    def give_out(self) -> None:
        """Gives to each seat what it can begin now, or as soon as it is done with what it has."""
        now = time.monotonic()
        idle = {seat.index: seat for seat in self._fleet.in_phase(Phase.IDLE)}
        for job in [job for job in self.plan.ready if self.plan.merge(job)]:
            if not idle:
                return
            near = [index for index in map(self._made_by.get, self.plan.merge(job) or ()) if index in idle]
            self._begin(idle.pop(near[0] if near else next(iter(idle))), job)
        if idle and not self.plan.ready:
            self._take_back(now)
        self._assign(idle, now)
        self._assign({seat.index: seat for seat, when in self._nearly_done() if when <= now}, now)
        self._back_up(now)

    def _times(self, now: float) -> list[float]:
        """When there will be something to give out, if nobody answers before."""
        idle = self._fleet.in_phase(Phase.IDLE)
        times = self._nearly_done() if self.plan.ready else []
        times += self._late_ahead() if idle else []
        times += self._late() if idle else []
        return [when for _, when in times if when > now]

    def _assign(self, free: Mapping[int, Seat], now: float) -> None:
        keys = {self._key(job): job for job in self.plan.ready if not self.plan.merge(job)}
        if free and keys:
            busy = {seat.index: self._remaining_s(seat, now) for seat in self._fleet.in_phase(Phase.BUSY) if seat.index not in free}
            for worker, key in self._pace.assign(list(free), list(keys), busy):
                self._begin(free[worker], keys[key])

    def _begin(self, seat: Seat, job: int) -> None:
        if job in self.plan.ready:
            self.plan.ready.remove(job)
        merge = self.plan.merge(job)
        if merge is not None:
            refs = [seat.actor.merge.remote(self.plan.held[merge.left], self.plan.held[merge.right])]
        else:
            call = self._calls[job]
            returns = 1 + (self._form == "apart") + call.returns
            method = seat.actor.execute.options(num_returns=returns)
            answer = method.remote(call.request, call.returns, self._form, self._shared, *call.states)
            refs = answer if returns > 1 else [answer]
        seat.next_job, seat.next_refs = job, refs
        if seat.phase is not Phase.BUSY:
            seat.phase = Phase.BUSY
            self._fleet.proceed(seat)
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
                    self._fleet.proceed(seat)
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
        self._fleet.proceed(seat)
        for other in self._at(job):  # a backup that came second
            if other.next_refs:
                self.plan.again(other.next_job)
            self._fleet.drain(other)

    def _lose(self, seat: Seat, loss: WorkerLost) -> None:
        job, following = seat.job, seat.next_job
        what = "a sum of shards" if self.plan.merge(job) else f"shard {job}"
        self._strikes[job] += 1
        self._pace.forget(seat.index)
        seat.job = -1
        if self._strikes[job] == MAX_STRIKES:
            self._fleet.replace(seat, loss, f"in {what}")
            raise ClusterError(poison(what, loss, self._options)) from None
        if following >= 0:
            self.plan.again(following)
        if not self._at(job):
            self.plan.again(job)
        self._fleet.replace(seat, loss, f"in {what}, which runs again on the next free worker")

    # What is given out, or given to another, before an answer is there. Each returns the seats in question, and from when on.

    def _nearly_done(self) -> list[tuple[Seat, float]]:
        """Seats that can be given another call beforehand."""
        return [
            (seat, seat.begun + expected - AHEAD_S)
            for seat in self._fleet.in_phase(Phase.BUSY)
            if not seat.next_refs and (expected := self._expected_s(seat)) is not None
        ]

    def _late_ahead(self) -> list[tuple[Seat, float]]:
        """Seats with a call given beforehand that is better done by another."""
        return [
            (seat, seat.begun + LATE * expected + AHEAD_S)
            for seat in self._fleet.in_phase(Phase.BUSY)
            if seat.next_refs and (expected := self._expected_s(seat)) is not None
        ]

    def _late(self) -> list[tuple[Seat, float]]:
        """Seats whose call, which no other seat has, is to be given out a second time."""
        if self._options.backup_after is None or self.plan.ready:
            return []
        return [
            (seat, seat.begun + self._options.backup_after * expected)
            for seat in self._fleet.in_phase(Phase.BUSY)
            if (expected := self._pace.expected(self._key(seat.job))) is not None
            and self.plan.merge(seat.job) is None
            and len(self._at(seat.job)) == 1
        ]

    def _take_back(self, now: float) -> None:
        for seat, when in self._late_ahead():
            if when <= now:
                self.plan.again(seat.next_job)
                self._fleet.take_back(seat)

    def _back_up(self, now: float) -> None:
        idle = sorted(self._fleet.in_phase(Phase.IDLE), key=lambda seat: self._pace.slowness(seat.index))
        late = sorted((when, seat.job) for seat, when in self._late() if when <= now)
        for seat, (_, job) in zip(idle, late, strict=False):
            self._begin(seat, job)

    def _at(self, job: int) -> list[Seat]:
        return [seat for seat in self._fleet.in_phase(Phase.BUSY) if seat.job == job]

    def _remaining_s(self, seat: Seat, now: float) -> float:
        follows = self._pace.expected(self._key(seat.next_job)) if seat.next_refs else None
        after = (follows or 0.0) * self._pace.slowness(seat.index)
        return max((self._expected_s(seat) or 0.0) - (now - seat.begun), 0.0) + after

    def _expected_s(self, seat: Seat) -> float | None:
        """What the call in hand takes on this worker, as far as is known."""
        expected = self._pace.expected(self._key(seat.job))
        return None if expected is None else expected * self._pace.slowness(seat.index)

    def _key(self, job: int) -> Key:
        kind = self._calls[job].kind if job < len(self._calls) else "sum of shards"
        return Key(kind, len(self._calls), job)
