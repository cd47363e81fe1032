"""A round's calls that can be given out, and to whom each goes. No Ray here."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from bomemeta.distributed.scheduler import UNEQUAL, WORTH_PLANNING_S, Key, Scheduler
from bomemeta.distributed.soonest import Soonest


class Load:
    """What workers still have to do, as far as that is known: by worker, until when it has work."""

    def __init__(self) -> None:
        self._ends: Soonest[int] = Soonest()
        self._speeds: dict[int, float] = {}
        self._work_s, self.speed = 0.0, 0.0  # of all, their ends as if it were time 0; of all

    def set(self, worker: int, end: float, slowness: float) -> None:
        self.drop(worker)
        self._speeds[worker] = 1.0 / slowness
        self._ends.set(worker, end)
        self._work_s += end / slowness
        self.speed += 1.0 / slowness

    def drop(self, worker: int) -> None:
        if worker in self._speeds:
            speed = self._speeds.pop(worker)
            self._work_s -= self._ends[worker] * speed
            self.speed -= speed
            self._ends.drop(worker)

    def done_in_s(self, now: float, more_s: float, call_s: float) -> float:
        """When these workers have done so much more work, of which the last call takes `call_s`;
        seconds from now, infinite where there are none. All of a worker of ordinary speed.
        """
        first = self._ends.least()
        if first is None:
            return float("inf")
        together = (self._work_s - now * self.speed + more_s) / self.speed
        return max(together, first[0] - now + call_s)


class Assignment(NamedTuple):
    """A call that a worker is to begin now, or after the one that it has."""

    worker: int
    number: int


class ReadyCalls:
    """The calls of a round that nobody has: longer ones are given out before shorter ones. Costs
    O(log n) for each that is given out.
    """

    def __init__(self, scheduler: Scheduler, keys: Sequence[Key]) -> None:
        self._scheduler, self._keys = scheduler, keys
        # Seconds on a worker of ordinary speed, by number, as far as they are known.
        self.expected = [scheduler.expected(key) for key in keys]
        self._costs = [seconds for seconds in self.expected if seconds is not None]
        self._planned = len(self._costs) == len(keys) and max(self._costs, default=0.0) > (
            WORTH_PLANNING_S
        )
        self._uneven = self._planned and scheduler.uneven  # the workers
        uneven = self._planned and max(self._costs) > UNEQUAL * min(self._costs)
        # The next is the last. Calls that take about the same stay in their order.
        self._queue = sorted(
            (self._costs[number] if uneven else 0.0, -number) for number in range(len(keys))
        )
        self._work_s = sum(self._costs) if self._planned else 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def again(self, number: int) -> None:
        """The call's worker was lost: it is the next to be done."""
        insort(self._queue, (float("inf"), -number))
        self._work_s += self._cost(number)

    def match(self, free: Sequence[int], load: Load, now: float) -> list[Assignment]:
        """Who of the free workers is given what: longer calls before shorter ones, each to the
        worker that had its shard last, or to the fastest.

        Where one worker is much slower than the others, a call that they would finish sooner is
        left for them. `load`: what those have who are not free; it is told what is given out.
        """
        scheduler = self._scheduler
        if len(free) > 1:
            free = sorted(free, key=scheduler.slowness)
        if self._uneven:
            return self._match_unequal(free, load, now)
        chosen = [self._take(-1) for _ in range(min(len(free), len(self._queue)))]
        if len(free) == 1:
            return [Assignment(free[0], number) for number in chosen]
        there = set(free)
        found: dict[int, int] = {}
        for number in chosen:
            worker = scheduler.last(self._keys[number])
            if worker in there and worker not in found:
                found[worker] = number
        had = set(found.values())
        others = (worker for worker in free if worker not in found)
        rest = [number for number in chosen if number not in had]
        given = [Assignment(worker, number) for worker, number in found.items()]
        return given + [Assignment(*pair) for pair in zip(others, rest, strict=False)]

    def _match_unequal(self, free: Sequence[int], load: Load, now: float) -> list[Assignment]:
        given = []
        for worker in free:  # the fastest first: what it leaves to others all the rest leave too
            if not self._queue:
                break
            slowness = self._scheduler.slowness(worker)
            for side in (-1, 0):  # the longest call, or else the shortest
                cost = self._cost(-self._queue[side][1])
                if cost * slowness <= load.done_in_s(now, self._work_s, cost):
                    given.append(Assignment(worker, self._take(side)))
                    load.set(worker, now + cost * slowness, slowness)
                    break
            else:
                break
        return given

    def _take(self, side: int) -> int:
        number = -self._queue.pop(side)[1]
        self._work_s -= self._cost(number)
        return number

    def _cost(self, number: int) -> float:
        return self._costs[number] if self._planned else 0.0
