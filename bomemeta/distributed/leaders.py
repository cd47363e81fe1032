"""Many workers: the driver calls about sqrt(W) leaders, and each of them calls its members.

A leader is an actor of its own, without CPUs, in which a whole `RayTransport` runs: its members are
that transport's workers. So whatever happens to a member (a death, a hang, a slow machine) is dealt
with by the code that deals with it where there are no leaders, and a leader is to the driver what
any worker is: it is given calls, may die at any time, and is replaced. It is no worker itself: a
worker computes for seconds in one call, and whoever it leads would wait for it meanwhile. The
driver does not hold the members: with their leader they end, and the next one starts its own.

Each leader is given a whole subtree of the round's sum, 2^k shards next to each other, so its sum
is a node of the tree and the bits are those of any other way (`summation.py`). What a call returns
goes through its leader by value and belongs to the driver: a leader's death costs the shards of its
call, which go to another leader, and no lower state.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ray import cloudpickle

from bomemeta.distributed import capacity, cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.fleet import EventSink, Fleet
from bomemeta.distributed.losses import MAX_STRIKES
from bomemeta.distributed.ray_transport import RayTransport
from bomemeta.distributed.slots import Slot
from bomemeta.distributed.transport import (
    Round,
    ShardCall,
    ShardReply,
    Worker,
    WorkerFactory,
    nothing,
)
from bomemeta.errors import ClusterError, LowerStateLost


def group_sizes(workers: int) -> list[int]:
    """How many members each leader has: a power of two near the root of `workers`, and what is left
    for the last.
    """
    size = 2 ** round(math.log2(workers) / 2)
    return [min(size, workers - first) for first in range(0, workers, size)]


def subtree(calls: int, leaders: int) -> int:
    """How many shards go to a leader at once: a power of two, so that they are a subtree."""
    return 1 << math.ceil(math.log2(max(1.0, calls / leaders)))


class Part(NamedTuple):
    """What a leader has to know of one of its calls; states come in order with all others'."""

    states: int
    returns: int
    kind: str


class Led(NamedTuple):
    """What a leader is given, beside arrays."""

    first: int  # the round's number of its first shard
    requests: bytes  # of all its calls, pickled
    parts: tuple[Part, ...]
    summed: bool


class LeaderReport(NamedTuple):
    """A leader's reply."""

    replies: list[bytes]  # pickled
    leader: int  # its process
    members: list[int]  # theirs
    nodes: list[str]
    lost: int  # members that were replaced since it last said so
    events: list[str]


class Sealed(NamedTuple):
    """One of a leader's requests, on its way to a member."""

    requests: bytes
    number: int


class Member:
    """A worker that is given its requests, and gives its replies, as bytes."""

    def __init__(self, factory: bytes, device: str) -> None:
        self._worker: Worker = pickle.loads(factory)(device)

    def execute(
        self, request: Sealed, broadcast: np.ndarray, *states: np.ndarray
    ) -> tuple[Any, ...]:
        own = pickle.loads(request.requests)[request.number]
        reply, *arrays = self._worker.execute(own, broadcast, *states)
        return cloudpickle.dumps(reply), *arrays


class Leader:
    """What runs in a leader's process: a `Worker` whose shards are computed by its members. What
    they compute passes through as bytes: a leader starts without torch, in a fifth of the memory.
    """

    def __init__(self, factory: WorkerFactory, options: RayOptions, device: str) -> None:
        self._events: list[str] = []
        self._lost = 0
        self._transport = RayTransport(factory, options, self._events.append)

    def execute(self, request: Led, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        given = iter(states)
        calls = [
            ShardCall(
                Sealed(request.requests, number),
                tuple(next(given) for _ in range(part.states)),
                part.returns,
                request.summed,
                part.kind,
            )
            for number, part in enumerate(request.parts)
        ]
        where = f"of the leader with pid {os.getpid()} (shard 0 there is {request.first}): "
        try:
            answer, moved = self._computed(broadcast, calls)
        except ClusterError as error:
            before = "".join(f"; before: {event}" for event in self._events)
            raise type(error)(f"{where}{error}{before}") from error
        lost = self._transport.replacements - self._lost
        self._lost += lost
        report = LeaderReport(
            [reply.reply for reply in answer.replies],
            os.getpid(),
            self._transport.worker_pids(),
            self._transport.worker_nodes(),
            lost,
            [where + event for event in self._events],
        )
        self._events.clear()
        return report, *([answer.total] if request.summed else []), *moved

    def _computed(
        self, broadcast: np.ndarray, calls: Sequence[ShardCall]
    ) -> tuple[Round, list[np.ndarray]]:
        """The members' answers, and their new states; once more where these were lost on the way."""
        for left in reversed(range(MAX_STRIKES)):
            answer = self._transport.run(broadcast, calls)
            handles = [state for reply in answer.replies for state in reply.states]
            try:
                return answer, self._transport.fetch(handles)
            except LowerStateLost:
                if not left:
                    raise
        raise AssertionError


class Leaders(Fleet):
    """The leaders, as the workers of a transport."""

    def __init__(self, factory: WorkerFactory, options: RayOptions, on_event: EventSink) -> None:
        self.sizes = group_sizes(options.workers)
        self._all, self._member = options, partial(Member, cloudpickle.dumps(factory))
        own = replace(
            options,
            workers=len(self.sizes),
            cpus_per_worker=0.0,
            gpus_per_worker=0.0,
            backup_after=None,
        )
        super().__init__(factory, own, on_event, "leader")
        self._reports: dict[int, LeaderReport] = {}  # by the leader's process

    @property
    def alive(self) -> int:
        return sum(len(report.members) for report in self.reports())

    def reports(self) -> list[LeaderReport]:
        """What the leaders that are there said last."""
        there = (slot.process.pid for slot in self.slots if slot.process is not None)
        return [self._reports[pid] for pid in there if pid in self._reports]

    def hear(self, report: LeaderReport) -> None:
        self._reports[report.leader] = report
        self.replacements += report.lost
        for event in report.events:
            self._on_event(event)

    def start(self, deadline: float) -> None:
        """See Fleet.start: raises where the members together have no room."""
        capacity.check_capacity(self._all, self._on_event)
        super().start(deadline)

    def allow(self, calls: int) -> None:
        """A leader may take as long for so many calls as its members might."""
        turns = math.ceil(subtree(calls, len(self.sizes)) / min(self.sizes)) + MAX_STRIKES
        longest = self._all.start_timeout_s + turns * self._all.step_timeout_s
        self.options = replace(self.options, step_timeout_s=longest)

    def build(self, slot: Slot) -> Any:
        """Room for its members is waited for: those of a leader that was lost take a moment to
        end.
        """
        options = replace(
            self._all,
            workers=self.sizes[slot.index],
            address=None,
            wait_for_room_s=max(self._all.wait_for_room_s, self._all.start_timeout_s),
        )
        factory = cloudpickle.dumps(partial(Leader, self._member, options))
        return slot.actor.lead.remote(factory, cluster.importable_paths())


class LedTransport(RayTransport):
    """A `RayTransport` whose workers have leaders. `workers` are the members."""

    _fleet: Leaders

    def __init__(
        self, factory: WorkerFactory, options: RayOptions, on_event: EventSink = lambda line: None
    ) -> None:
        super().__init__(factory, options, on_event, Leaders(factory, options, on_event))

    def leader_pids(self) -> list[int]:
        return super().worker_pids()

    def worker_pids(self) -> list[int]:
        return [pid for report in self._fleet.reports() for pid in report.members]

    def worker_nodes(self) -> list[str]:
        return [node for report in self._fleet.reports() for node in report.nodes]

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        """See Transport.run."""
        self._fleet.allow(len(calls))
        size = subtree(len(calls), len(self._fleet.sizes))
        groups = [calls[first : first + size] for first in range(0, len(calls), size)]
        led = [_led(group, size * number) for number, group in enumerate(groups)]
        answer = super().run(broadcast, led, meanwhile)
        replies = []
        for group, reply in zip(groups, answer.replies, strict=True):
            self._fleet.hear(reply.reply)
            states = iter(reply.states)
            for call, each in zip(group, reply.reply.replies, strict=True):
                own = tuple(next(states) for _ in range(call.returns))
                replies.append(ShardReply(pickle.loads(each), own))
        return answer._replace(replies=replies)


def _led(group: Sequence[ShardCall], first: int) -> ShardCall:
    requests = cloudpickle.dumps([call.request for call in group])
    parts = tuple(Part(len(call.states), call.returns, call.kind) for call in group)
    return ShardCall(
        Led(first, requests, parts, group[0].summed),
        tuple(state for call in group for state in call.states),
        sum(call.returns for call in group),
        group[0].summed,
        group[0].kind,
    )
