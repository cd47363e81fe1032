"""A Ray that computes nothing, on a clock of its own: what is left of a round is the driver's own
scheduling. Workers die, hang and are slow in a seeded order. Of leaders there are their reports,
with as many members in each as `group_sizes` gives a leader.
"""

from __future__ import annotations

import heapq
import importlib
import itertools
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray.exceptions as errors

from bomemeta.distributed.leaders import LeaderReport, Led, group_sizes

# Modules of bomemeta.distributed that know Ray or the clock.
PATCHED = ("actor", "capacity", "cluster", "fleet", "ray_round", "ray_transport", "slots")
CALL_S, JITTER, BUILD_S = 1.0, 0.2, 5.0
PER_NODE = 16


@dataclass(eq=False)
class Ref:
    """An answer that is there at `end`, by the stubbed clock."""

    number: int
    actor: Any = None
    answer: Any = None
    end: float = 0.0
    done: bool = False
    forgotten: bool = False  # of a call that was taken back, or of an actor that was killed

    def hex(self) -> str:
        return str(self.number)


@dataclass(eq=False)
class Actor:
    """Calls that an actor has, one after the other."""

    number: int
    alive: bool = True
    free_at: float = 0.0
    calls: deque[tuple[float, list[Ref]]] = field(default_factory=deque)


class StubbedRay:
    """Attributes:
    calls: actor calls so far.
    losses: workers that died so far.
    """

    ObjectRef = Ref
    exceptions = errors

    def __init__(self, workers: int, seed: int = 0, deaths: float = 0.0, slow: float = 0.0) -> None:
        self.now, self.calls, self.losses = 0.0, 0, 0
        self._workers, self._deaths, self._slow = workers, deaths, slow
        self._members = group_sizes(workers)[0]
        self._dice, self._numbers = random.Random(seed), itertools.count()
        self._events: list[tuple[float, int, list[Ref]]] = []
        self._unheard: dict[Ref, None] = {}  # answers that are there, in the order of their coming
        context = SimpleNamespace(get_node_id=lambda: "driver")
        self.get_runtime_context = lambda: context
        self.util = SimpleNamespace(
            get_current_placement_group=lambda: None, get_node_ip_address=lambda: "127.0.0.1"
        )
        self.clock = SimpleNamespace(
            monotonic=lambda: self.now, perf_counter=lambda: self.now, sleep=self._sleep
        )

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": "driver", "Resources": {"CPU": float(self._workers)}}]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(self._workers)}

    def put(self, value: Any) -> Ref:
        return Ref(next(self._numbers), answer=value, done=True)

    def remote(self, **options: Any) -> Callable[[type], Any]:
        return lambda cls: SimpleNamespace(remote=self._make)

    def kill(self, actor: Any, no_restart: bool = True) -> None:
        actor.behind.alive = False
        for _, refs in actor.behind.calls:
            self._forget(refs)

    def cancel(self, ref: Ref) -> None:
        """Takes back what the actor has not begun, and does nothing else."""
        actor = ref.actor
        if actor.calls and actor.calls[-1][1][0] is ref:
            begun, refs = actor.calls[-1]
            self._forget(refs)
            if begun > self.now:
                actor.calls.pop()
                actor.free_at = begun
                self._answer(refs, self.now, errors.TaskCancelledError())

    def _forget(self, refs: Sequence[Ref]) -> None:
        for ref in refs:
            ref.forgotten = True
            self._unheard.pop(ref, None)

    def wait(
        self, refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        """Takes it that the caller waits for all that is unheard and not forgotten: to look each up
        would cost more than what is measured here.
        """
        if refs[0].forgotten:
            return [ref for ref in refs if ref.done], [ref for ref in refs if not ref.done]
        limit = float("inf") if timeout is None else self.now + timeout
        while self._events and (len(self._unheard) < num_returns or self._events[0][0] <= self.now):
            if self._events[0][0] > limit:
                break
            end, _, answered = heapq.heappop(self._events)
            first = answered[0]
            if first.end != end or first.done:
                continue
            self.now = max(self.now, end)
            for ref in answered:
                ref.done = True
            if not first.forgotten:
                self._unheard[first] = None
        if len(self._unheard) < num_returns and limit < float("inf"):
            self.now = max(self.now, limit)
        return list(itertools.islice(self._unheard, num_returns)), []

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        for ref in [refs] if isinstance(refs, Ref) else refs:
            self._unheard.pop(ref, None)
            if isinstance(ref.answer, BaseException):
                raise ref.answer
        return refs.answer if isinstance(refs, Ref) else [ref.answer for ref in refs]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _make(self) -> Any:
        actor = Actor(next(self._numbers))
        speed = 10.0 if self._dice.random() < self._slow else 1.0

        def method(name: str) -> Any:
            def call(returns: int, *given: Any) -> Any:
                return self._call(actor, name, returns, speed, given)

            return SimpleNamespace(
                remote=lambda *given: call(1, *given),
                options=lambda num_returns=1, **_: SimpleNamespace(
                    remote=lambda *given: call(num_returns, *given)
                ),
            )

        names = ("build", "lead", "execute", "merge", "ping")
        return SimpleNamespace(behind=actor, **{name: method(name) for name in names})

    def _call(
        self, actor: Actor, name: str, returns: int, speed: float, given: Sequence[Any]
    ) -> Any:
        self.calls += 1
        refs = [Ref(next(self._numbers), actor) for _ in range(returns)]
        if not actor.alive:
            self._answer(refs, self.now, errors.ActorDiedError())
        else:
            begun = max(actor.free_at, self.now)
            seconds = {"build": BUILD_S, "lead": BUILD_S, "ping": 0.001}.get(name, CALL_S * speed)
            end = begun + seconds * (1 + JITTER * self._dice.random())
            while actor.calls and actor.calls[0][1][0].done:
                actor.calls.popleft()
            if name == "execute" and self._dice.random() < self._deaths:
                actor.alive, self.losses = False, self.losses + 1
                self._answer(refs, (begun + end) / 2, errors.ActorDiedError())
            else:
                process = importlib.import_module("bomemeta.distributed.actor").Process
                node = f"node {actor.number % max(1, self._workers // PER_NODE)}"
                pid = 10**9 + actor.number
                answer = process(pid, "", node) if name in ("build", "lead") else None
                if given and isinstance(given[0], Led):
                    replies = [pickle.dumps(None)] * len(given[0].parts)
                    members = list(range(pid, pid + self._members))
                    answer = LeaderReport(replies, pid, members, [node] * self._members, 0, [])
                actor.free_at = end
                actor.calls.append((begun, refs))
                self._answer(refs, end, answer)
        return refs if returns > 1 else refs[0]

    def _answer(self, refs: list[Ref], end: float, answer: Any) -> None:
        for ref in refs:
            ref.answer, ref.end = answer, end
        heapq.heappush(self._events, (end, refs[0].number, refs))

    @contextmanager
    def instead(self) -> Iterator[None]:
        """bomemeta.distributed takes this for Ray and its clock."""
        with mock.patch.dict("os.environ", {"RAY_ADDRESS": "stubbed"}):
            transport = importlib.import_module("bomemeta.distributed.ray_transport").RayTransport
            # There is no head to watch.
            patches = [mock.patch.object(transport, "_watch_head")]
            for name in PATCHED:
                try:
                    module = importlib.import_module(f"bomemeta.distributed.{name}")
                except ImportError:
                    continue
                for attribute, stub in (("ray", self), ("time", self.clock)):
                    if hasattr(module, attribute):
                        patches.append(mock.patch.object(module, attribute, stub))
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                for patch in reversed(patches):
                    patch.stop()
