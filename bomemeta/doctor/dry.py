"""Dry steps: the run's own step in this process on a few tasks, with what it holds, sends and takes
counted where it arises.

Nothing is written. A step on one and a step on two tasks give what a task adds, and the rest; both
are the same at every run of them.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bomemeta.assembly import computing_of
from bomemeta.checkpoint import written_bytes
from bomemeta.config import Config
from bomemeta.core import tree
from bomemeta.core.arguments import replaced
from bomemeta.core.inner import evaluate
from bomemeta.core.problem import (
    Problem,
    SharedProblem,
    Split,
    StreamProblem,
    stream_length,
)
from bomemeta.core.solver import LowerStates, Reduced, Solver
from bomemeta.core.tree import Params
from bomemeta.data.digest import as_texts, digest_of
from bomemeta.distributed.rounds import SharedRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker, variant_of
from bomemeta.engine import FRESH_TASKS_PER_STEP, Trainer
from bomemeta.evaluation import EVALUATION_SHARD
from bomemeta.live_bytes import LiveBytes

# A dry step that takes this long is not repeated for anything that can be done without.
SLOW_S = 20.0


class Line(NamedTuple):
    """`rest + tasks * each`."""

    rest: float
    each: float

    def at(self, tasks: int) -> float:
        return self.rest + tasks * self.each


def line_through(points: Sequence[tuple[int, float]]) -> Line:
    """Through the values at so many tasks; flat where there is one."""
    (n, low), (m, high) = points[0], points[-1]
    if n == m:
        return Line(low, 0.0)
    each = max((high - low) / (m - n), 0.0)
    return Line(low - n * each, each)


class Dry(NamedTuple):
    """The result of steps on so many tasks, all in one shard."""

    tasks: int
    worker_bytes: int  # most at any time, in the worker; on a GPU: allocated there
    driver_bytes: int  # likewise at the driver, without what workers send
    reduces: int  # rounds of the first step
    bytes_reduced: int  # of the first step, from one shard
    bytes_reduced_later: int  # of a later one
    sent_bytes: int  # of the first step, to one node
    kernels: int  # of a later step, where y is shared; else 0
    asked_bytes: int  # what a kernel starts from but y: x and the problem's memory
    answer_bytes: int  # of a later step: the sums that its kernels end with
    state_bytes: int  # lower state of a task, where it persists
    checkpoint_bytes: int
    log_bytes: int  # of a line of metrics.jsonl
    log_numbers: int
    worker_s: float  # of a later step, in the worker
    step_s: float  # of a later step, whole


class Still(NamedTuple):
    """The result of a step in which x stands still, on as many tasks as a `Dry`."""

    reduces: int
    bytes_reduced: int  # from one shard
    kernels: int
    worker_s: float
    step_s: float


class TaskCounts(NamedTuple):
    """How a step's tasks are cut."""

    tasks: int  # in a step
    shards: int  # those that have tasks
    largest: int  # tasks in the largest shard
    evaluated: int  # tasks that an evaluation holds in a worker at once; 0: there is none


def plan_of(config: Config, problem: Problem) -> TaskCounts:
    num_tasks = problem.num_tasks
    tasks = config.tasks_per_step or (FRESH_TASKS_PER_STEP if num_tasks is None else num_tasks)
    tasks = tasks if num_tasks is None else min(tasks, num_tasks)
    shards = min(config.shards, tasks)
    if problem.meta_tests:
        evaluated = min(EVALUATION_SHARD, config.evaluation.episodes)
    else:
        evaluated = 0 if num_tasks is None else -(-num_tasks // min(config.shards, num_tasks))
    return TaskCounts(tasks, shards, -(-tasks // shards), evaluated)


def device_of(config: Config) -> str:
    """Where the dry step runs: where the run's tasks would, or on the CPU where this machine has no
    such device.
    """
    wants_gpu = config.device != "cpu" if config.workers == 0 else config.gpus_per_worker > 0
    return "cuda:0" if wants_gpu and torch.cuda.is_available() else "cpu"


class _Counts:
    """What the worker below was seen to do since `reset`."""

    def __init__(self) -> None:
        self.driver: LiveBytes | None = None  # while this is set, bytes are counted
        self.resident: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        self.peak = self.sent = 0
        self.kernels = self.asked = self.answered = 0
        self.seconds = 0.0


class _ObservedWorker:
    """A worker whose calls are counted and timed, by what it holds beside what was there before."""

    def __init__(self, worker: ShardWorker, counts: _Counts, device: str) -> None:
        self._worker, self._counts, self._device = worker, counts, device

    def execute(self, request: Any, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        counts = self._counts
        counts.sent += broadcast.nbytes
        started = time.perf_counter()
        if counts.driver is None:
            results = self._worker.execute(request, broadcast, *states)
        elif self._device == "cpu":
            with counts.driver.paused(), LiveBytes(counts.resident) as live:
                results = self._worker.execute(request, broadcast, *states)
            counts.peak = max(counts.peak, live.peak)
        else:
            torch.cuda.reset_peak_memory_stats()
            with counts.driver.paused():
                results = self._worker.execute(request, broadcast, *states)
            counts.peak = max(counts.peak, torch.cuda.max_memory_allocated())
        counts.seconds += time.perf_counter() - started
        return results


class _ObservedRun(SharedRun):
    """A run whose kernels are counted, with what they start from and end with: what goes between the
    driver and the workers where these run the kernels (`reduce: collective`).
    """

    def __init__(self, run: SharedRun, counts: _Counts) -> None:
        self.__dict__ |= run.__dict__
        self._counts = counts

    def __call__(
        self,
        kernel: Any,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        keeps: bool = False,
        **arguments: Any,
    ) -> Reduced:
        reduced = super().__call__(kernel, solver, upper, lower, keeps, **arguments)
        self._count(upper, reduced.sums)
        return reduced

    def update_memory(self, solver: Solver, upper: Params, lower: LowerStates) -> Params:
        memory = super().update_memory(solver, upper, lower)
        self._count(upper, {"memory": memory})
        return memory

    def _count(self, upper: Params, sums: Any) -> None:
        counts = self._counts
        counts.kernels += 1
        counts.asked = _bytes({"x": upper, **self._blocks.memory})
        counts.answered += _bytes(sums)


def _bytes(values: Any) -> int:
    return sum(tensor.nbytes for tensor in tree.tensors(values))


class DryRun:
    """The run's problem and solver in this process; `device` is where its tasks are computed here."""

    def __init__(self, config: Config, problem: Problem, solver: Solver) -> None:
        self.device = device_of(config)
        self._counts = _Counts()
        self._counts.resident = _resident(problem)
        counts = self._counts

        def worker(device: str) -> _ObservedWorker:
            shard_worker = ShardWorker(
                lambda changes: variant_of(problem, changes),
                config.task_map,
                device,
                computing=computing_of(config, problem),
            )
            return _ObservedWorker(shard_worker, counts, device)

        transport = SerialTransport(worker, threads=config.threads, device=self.device)
        self.trainer = Trainer(config, problem, solver.unpaced(), transport)
        # A stream's memory fills up: its last steps are those that need most.
        self._first = max(self.trainer.steps - 3, 0) if stream_length(problem) is not None else 0

    def steps(self, tasks: int) -> Dry:
        """A counted step, one more where y persists (it then comes with the call), and one that is
        timed. Raises what a step raises.
        """
        self._start()
        state = self.trainer.state
        seen = [self._counted(tasks)]
        if self.trainer.problem.num_tasks is not None:
            seen.append(self._counted(tasks))
        self._counts.reset()
        started = time.perf_counter()
        run, metrics = self._step(tasks)
        step_s = time.perf_counter() - started
        counts = self._counts
        handles = [np.asarray(handle).nbytes for handle in state.lower.handles.values()]
        saved = self.trainer.checkpoint()._replace(
            data=as_texts(digest_of(self.trainer.problem)), files={"metrics.jsonl": "0" * 64}
        )
        x = sum(tensor.nbytes for tensor in (*state.upper.params.values(), *state.memory.values()))
        return Dry(
            tasks=tasks,
            worker_bytes=max(one.worker for one in seen),
            driver_bytes=x + max(one.driver for one in seen),
            reduces=seen[0].reduces,
            bytes_reduced=seen[0].reduced,
            bytes_reduced_later=run.traffic.bytes_reduced,
            sent_bytes=seen[0].sent,
            kernels=counts.kernels,
            asked_bytes=counts.asked,
            answer_bytes=counts.answered,
            state_bytes=max(handles, default=0),
            checkpoint_bytes=written_bytes(saved),
            log_bytes=len(json.dumps(metrics)),
            log_numbers=len(metrics),
            worker_s=self._counts.seconds,
            step_s=step_s,
        )

    def with_inner_steps(self, inner_steps: int) -> int:
        """Bytes of a worker in one step on one task with another T."""
        other = self._with(replaced(self.trainer.solver, {"inner_steps": inner_steps}))
        other._start()
        return other._counted(1).worker

    def still(self, solver: Solver, tasks: int, step: int) -> Still:
        """Step `step` of this solver, in which x stands still: a second one of the kind, timed."""
        other = self._with(solver)
        other.trainer.start(step)
        other._step(tasks)
        other.trainer.state.step = step
        self._counts.reset()
        started = time.perf_counter()
        run, _ = other._step(tasks)
        step_s = time.perf_counter() - started
        traffic = run.traffic
        return Still(
            traffic.reduces,
            traffic.bytes_reduced,
            self._counts.kernels,
            self._counts.seconds,
            step_s,
        )

    def _with(self, solver: Solver) -> DryRun:
        other, here = object.__new__(DryRun), self.trainer
        trainer = Trainer(here.config, here.problem, solver, here.transport)
        other.__dict__ |= self.__dict__ | {"trainer": trainer}
        return other

    def evaluation(self, tasks: int) -> tuple[int, float]:
        """Bytes and seconds of a worker that evaluates so many tasks at once."""
        problem, settings = self.trainer.problem, self.trainer.config.evaluation
        self._start()
        state = self.trainer.state
        split: Split = (
            "test" if problem.meta_tests or isinstance(problem, SharedProblem) else "train"
        )
        own = not problem.meta_tests
        if own:
            self._step(tasks)
        rest: dict[str, Any] = {"persistent": own}
        steps = 0 if own else settings.inner_steps
        run = self.trainer.run_on(
            range(tasks), 1, step=0, split=split, differentiable=False, **rest
        )
        ask = functools.partial(
            run, evaluate, self.trainer.solver, state.upper.params, state.lower, steps=steps
        )
        with self._counting():
            ask()
        peak = self._counts.peak
        self._counts.reset()
        ask()
        return peak, self._counts.seconds

    def updating_memory(self) -> int:
        """Bytes of a worker where the problem's memory is made anew; 0 where it never is."""
        problem = self.trainer.problem
        if not isinstance(problem, StreamProblem):
            return 0
        step = next((step for step in range(self.trainer.steps) if problem.memory_due(step)), None)
        if step is None:
            return 0
        self.trainer.start(step)
        state = self.trainer.state
        self._step(1)
        run = self.trainer.run_on(range(1), 1, step=step)
        assert isinstance(run, SharedRun), "the problem is shared"
        with self._counting():
            run.update_memory(self.trainer.solver, state.upper.params, state.lower)
        return self._counts.peak

    def _start(self) -> None:
        self.trainer.start(self._first)

    def _step(self, tasks: int) -> tuple[Any, dict[str, float]]:
        step = min(self.trainer.state.step, self.trainer.steps - 1)
        run = self.trainer.run_on(range(tasks), 1, step=step)
        if isinstance(run, SharedRun):
            run = _ObservedRun(run, self._counts)
        return run, self.trainer.step(run)

    def _counted(self, tasks: int) -> _Seen:
        with self._counting() as driver:
            run, _ = self._step(tasks)
        return _Seen(
            self._counts.peak,
            driver.peak,
            run.traffic.reduces,
            run.traffic.bytes_reduced,
            self._counts.sent,
        )

    @contextmanager
    def _counting(self) -> Iterator[LiveBytes]:
        """Inside, the worker's calls are counted, and what is beside them in what is yielded."""
        self._counts.reset()
        with LiveBytes() as driver:
            self._counts.driver = driver
            try:
                yield driver
            finally:
                self._counts.driver = None


class _Seen(NamedTuple):
    """Of one counted step."""

    worker: int
    driver: int
    reduces: int
    reduced: int
    sent: int


def _resident(problem: Problem) -> list[Tensor]:
    """What `load` keeps and gives again and again: it is part of the process, and not of a step."""
    once, again = (problem.load((0,), 0, "train") for _ in range(2))
    return [
        tensor
        for name, tensor in once.items()
        if tensor.nbytes and tensor.data_ptr() == again[name].data_ptr()
    ]
