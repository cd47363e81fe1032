"""What a round still has to do: its calls and, where shares are added on the workers, the merges of
the tree. No Ray in here.

Jobs are the nodes of `summation.merges`: 0..calls-1 are the calls, the others merges. The share of
a job is held (a reference) until its merge has been done; one that is lost with its node is made
again, with whatever it was made of and is not held any more.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from bomemeta.distributed.summation import Merge, merges
from bomemeta.distributed.transport import ShardReply


class Plan:
    """Attributes:
    calls: calls that can be given to a worker now.
    sums: merges that can; they come first, for what they let go of.
    held: references to the shares that are there, by job.
    answers: the calls' replies, by number.
    """

    def __init__(self, calls: int, merged: bool) -> None:
        self._calls = calls
        self._merges = {merge.node: merge for merge in merges(calls)} if merged else {}
        self._parents = {
            child: merge for merge in self._merges.values() for child in (merge.left, merge.right)
        }
        self.calls: deque[int] = deque(range(calls))
        self.sums: deque[int] = deque()
        self.held: dict[int, Any] = {}
        self.answers: dict[int, ShardReply] = {}

    @property
    def root(self) -> int:
        return self._calls + len(self._merges) - 1

    @property
    def finished(self) -> bool:
        return len(self.answers) == self._calls and (not self._merges or self.root in self.held)

    def merge(self, job: int) -> Merge | None:
        """The merge that the job is; None for a call."""
        return self._merges.get(job)

    def done(self, job: int, share: Any = None) -> None:
        """The job's share is held from now on; what it was made of is let go."""
        if share is None:
            return
        self.held[job] = share
        if (own := self._merges.get(job)) is not None:
            del self.held[own.left], self.held[own.right]
        above = self._parents.get(job)
        if above is not None and above.left in self.held and above.right in self.held:
            self.sums.append(above.node)

    def again(self, job: int) -> None:
        """The job's worker was lost: it is the next to be done."""
        (self.sums if job in self._merges else self.calls).append(job)

    def lost(self, job: int) -> None:
        """The job's share is gone with its node."""
        self.held.pop(job, None)
        self._make(job)

    def _make(self, job: int) -> None:
        own = self._merges.get(job)
        if own is None:
            self.calls.append(job)
            return
        missing = [side for side in (own.left, own.right) if side not in self.held]
        for side in missing:
            self._make(side)
        if not missing:
            self.sums.append(job)
