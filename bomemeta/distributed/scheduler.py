"""How long calls take, how fast workers are and who had what last, learned from answers; who is
given what because of it. No Ray here.

None of it changes a bit of any result: a call's answer does not depend on who computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

# Below this nobody waits for a faster worker: the clock's own noise is of that size.
WORTH_PLANNING_S = 0.05
# Workers whose speeds differ by less are taken for equal.
UNEQUAL = 1.5
# A worker that was given nothing for a while is believed to recover: what is known of its slowness
# fades by this with every round.
FORGETTING = 0.9


class Key(NamedTuple):
    """Calls that are expected to take the same time."""

    kind: str
    calls: int  # of the round
    number: int  # among them


class Scheduler:
    """Running means of the calls' seconds on a worker of ordinary speed, and of each worker's
    slowness beside the fastest (1).
    """

    def __init__(self) -> None:
        self._seconds: dict[Key, float] = {}
        self._slowness: dict[int, float] = {}
        self._warm: set[int] = set()  # workers that have answered
        self._cold: set[Key] = (
            set()
        )  # calls of which no more is known than what a worker's first answer took
        self._last: dict[
            tuple[int, int], int
        ] = {}  # who computed a shard last, and has its data at hand

    def slowness(self, worker: int) -> float:
        return self._slowness.get(worker, 1.0)

    def expected(self, key: Key) -> float | None:
        """Seconds on a worker of ordinary speed; None before the first answer."""
        return self._seconds.get(key)

    def learn(self, worker: int, key: Key, seconds: float) -> None:
        self._last[key.calls, key.number] = worker
        slowness = self._slowness.get(worker, 1.0)
        if worker not in self._warm:
            # A process's first answer has imports and the reading of data in it: better than
            # nothing, until there is another.
            self._warm.add(worker)
            if key not in self._seconds:
                self._seconds[key] = seconds / slowness
                self._cold.add(key)
            return
        if key in self._cold:
            self._cold.remove(key)
            del self._seconds[key]
        before = self._seconds.get(key)
        if before is None:
            # Is it the call or the worker? Beside the round's other calls of this kind, half of the
            # difference is put down to each.
            alike = [
                known
                for other, known in self._seconds.items()
                if other[:2] == key[:2] and other not in self._cold
            ]
            before = median(alike) if alike else seconds / slowness
            ratio = (seconds / max(before, 1e-9)) ** 0.5
        else:
            ratio = seconds / max(before, 1e-9)
        # Of very short times nothing can be told: what was believed fades.
        ratio = min(max(ratio, 1 / 64), 64.0) if before > WORTH_PLANNING_S else 1.0
        if worker in self._slowness:
            self._slowness[worker] = slowness = (slowness + ratio) / 2
        elif before > WORTH_PLANNING_S:
            self._slowness[worker] = slowness = ratio
        self._seconds[key] = (before + seconds / slowness) / 2
        self._normalise()

    def _normalise(self) -> None:
        """The fastest worker is of ordinary speed. Else dear calls on fast workers and cheap calls
        on slow ones could not be told apart, and a worker with one bad moment would be taken for
        slow for ever, while the others get all calls.
        """
        fastest = min(self._slowness.values(), default=1.0)
        self._slowness = {worker: slowness / fastest for worker, slowness in self._slowness.items()}
        self._seconds = {key: seconds * fastest for key, seconds in self._seconds.items()}

    def forget(self, worker: int) -> None:
        """A new process has taken the worker's place."""
        self._slowness.pop(worker, None)
        self._warm.discard(worker)

    def fade(self, unused: Sequence[int]) -> None:
        """After a round in which these workers were given nothing."""
        for worker in unused:
            if worker in self._slowness:
                self._slowness[worker] = 1.0 + FORGETTING * (self._slowness[worker] - 1.0)

    def assign(
        self, idle: Sequence[int], ready: Sequence[Key], busy: Mapping[int, float]
    ) -> list[tuple[int, Key]]:
        """Who is to begin what now: longer calls before shorter ones, each to the worker that had
        its shard last, or to the fastest.

        Where one worker is much slower than the others, a call that they would finish sooner is
        left for them. `busy`: the seconds that each of the others still has to work.
        """
        costs = {key: seconds for key in ready if (seconds := self.expected(key)) is not None}
        planned = len(costs) == len(ready) and max(costs.values(), default=0.0) > WORTH_PLANNING_S
        if planned and max(costs.values()) > UNEQUAL * min(costs.values()):
            ready = sorted(ready, key=lambda key: -costs[key])  # stable: equal ones stay in order
        idle = sorted(idle, key=self.slowness)
        workers = [*idle, *busy]
        if planned and max(self.slowness(worker) for worker in workers) > UNEQUAL:
            free_at = {**dict.fromkeys(idle, 0.0), **busy}
            begun: dict[int, Key] = {}
            for key in ready:
                ends = {
                    worker: free_at[worker] + costs[key] * self.slowness(worker)
                    for worker in workers
                }
                best = min(ends, key=ends.__getitem__)
                free_at[best] = ends[best]
                if best not in busy:
                    begun.setdefault(best, key)
            return list(begun.items())
        now = ready[: len(idle)]
        found = {
            worker: key
            for key in now
            if (worker := self._last.get((key.calls, key.number), -1)) in idle
        }
        free = [worker for worker in idle if worker not in found]
        rest = [key for key in now if key not in found.values()]
        return [*found.items(), *zip(free, rest, strict=False)]
