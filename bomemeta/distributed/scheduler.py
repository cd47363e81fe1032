"""How long calls take, how fast workers are and who had what last, learned from answers; who is
given what because of it. No Ray here. An answer costs O(log W).

None of it changes a bit of any result: a call's answer does not depend on who computes it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from bomemeta.distributed.soonest import Soonest

# Below this nobody waits for a faster worker: the clock's own noise is of that size.
WORTH_PLANNING_S = 0.05
# Workers whose speeds differ by less are taken for equal.
UNEQUAL = 1.5
# A worker that was given nothing for a while is believed to recover: what is known of its slowness
# fades by this with every round.
FORGETTING = 0.9
# Where calls stay with their workers, a call that takes long and a slow worker cannot be told
# apart: with every answer what is believed of the worker moves so far towards equal.
EASING = 0.9


class Key(NamedTuple):
    """Calls that are expected to take the same time."""

    kind: str
    calls: int  # of the round
    number: int  # among them


class Scheduler:
    """Running means of the calls' seconds on a worker of ordinary speed, and of each worker's
    slowness beside the fastest (1).

    The fastest worker is of ordinary speed. Else dear calls on fast workers and cheap calls on slow
    ones could not be told apart, and a worker with one bad moment would be taken for slow for ever,
    while the others get all calls. So everything is kept in a unit of its own and read in that of
    the worker that is the fastest by then.
    """

    def __init__(self) -> None:
        self._seconds: dict[Key, float] = {}
        self._slowness: Soonest[int] = Soonest()
        self._quickness: Soonest[int] = Soonest()  # the same numbers, negative
        self._alike: dict[tuple[str, int], list[float]] = {}  # first known seconds, ascending
        self._warm: set[int] = set()  # workers that have answered
        # Calls of which no more is known than what a worker's first answer took.
        self._cold: set[Key] = set()
        # Who computed a shard last, and has its data at hand.
        self._last: dict[tuple[int, int], int] = {}

    def slowness(self, worker: int) -> float:
        return self._slowness[worker] / self._fastest if worker in self._slowness else 1.0

    @property
    def uneven(self) -> bool:
        """Whether a worker is much slower than another."""
        slowest = self._quickness.least()
        return slowest is not None and -slowest[0] > UNEQUAL * self._fastest

    def expected(self, key: Key) -> float | None:
        """Seconds on a worker of ordinary speed; None before the first answer."""
        seconds = self._seconds.get(key)
        return None if seconds is None else seconds * self._fastest

    def learn(self, worker: int, key: Key, seconds: float) -> None:
        self._last[key.calls, key.number] = worker
        fastest, slowness = self._fastest, self.slowness(worker)
        if worker not in self._warm:
            # A process's first answer has imports and the reading of data in it: better than
            # nothing, until there is another.
            self._warm.add(worker)
            if key not in self._seconds:
                self._seconds[key] = seconds / slowness / fastest
                self._cold.add(key)
            return
        if key in self._cold:
            self._cold.remove(key)
            del self._seconds[key]
        before = self.expected(key)
        first = before is None
        if before is None:
            # Is it the call or the worker? Beside the round's other calls of this kind, half of the
            # difference is put down to each.
            alike = self._alike.get(key[:2])
            before = alike[len(alike) // 2] * fastest if alike else seconds / slowness
            ratio = (seconds / max(before, 1e-9)) ** 0.5
        else:
            ratio = seconds / max(before, 1e-9)
        # Of very short times nothing can be told: what was believed fades.
        ratio = min(max(ratio, 1 / 64), 64.0) if before > WORTH_PLANNING_S else 1.0
        if worker in self._slowness:
            slowness = 1.0 + EASING * ((slowness + ratio) / 2 - 1.0)
            self._set(worker, slowness * fastest)
        elif before > WORTH_PLANNING_S:
            slowness = ratio
            self._set(worker, slowness * fastest)
        self._seconds[key] = (before + seconds / slowness) / 2 / fastest
        if first:
            insort(self._alike.setdefault(key[:2], []), self._seconds[key])

    def last(self, key: Key) -> int | None:
        """Who computed the shard last."""
        return self._last.get((key.calls, key.number))

    def forget(self, worker: int) -> None:
        """A new process has taken the worker's place."""
        self._slowness.drop(worker)
        self._quickness.drop(worker)
        self._warm.discard(worker)

    def fade(self, unused: Sequence[int]) -> None:
        """After a round in which these workers were given nothing."""
        for worker in unused:
            if worker in self._slowness:
                slowness = 1.0 + FORGETTING * (self.slowness(worker) - 1.0)
                self._set(worker, slowness * self._fastest)

    @property
    def _fastest(self) -> float:
        least = self._slowness.least()
        return 1.0 if least is None else least[0]

    def _set(self, worker: int, slowness: float) -> None:
        self._slowness.set(worker, slowness)
        self._quickness.set(worker, -slowness)
