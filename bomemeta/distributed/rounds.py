"""The driver's side of a round: cuts a step's tasks into shards, sends x once, and has the shards'
sums added.

`StepRun` runs kernels where the tasks are; `SharedRun` runs them here, on an oracle that asks the
blocks of a shared lower problem.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.inner import update_memory
from bomemeta.core.problem import Problem, Split
from bomemeta.core.reduced_oracle import ReducedOracle
from bomemeta.core.solver import Kernel, LowerGroups, LowerStates, Reduced, Solver, Sums
from bomemeta.core.tree import Layout, Params
from bomemeta.distributed.packing import Packed, pack, pack_tasks, unpack
from bomemeta.distributed.transport import ShardCall, Transport, nothing
from bomemeta.distributed.worker import Request
from bomemeta.errors import DivergenceError


@dataclass
class Traffic:
    """What a step's rounds added up."""

    reduces: int = 0  # rounds whose answers were added
    bytes_reduced: int = 0  # over all shards, wherever they were added
    driver_bytes: int = 0  # that came to the driver
    exchanged_bytes: int = 0  # that one worker sent to the others (reduce: collective)

    def add(self, other: Traffic) -> None:
        self.reduces += other.reduces
        self.bytes_reduced += other.bytes_reduced
        self.driver_bytes += other.driver_bytes
        self.exchanged_bytes += other.exchanged_bytes


class StepRun:
    """Runs kernels on the tasks of one step (or of an evaluation). `seconds` says where the time
    went.

    The shards are logical: their number is part of the config, and neither the number of workers
    nor who computes what changes a bit.
    """

    def __init__(
        self,
        transport: Transport,
        task_ids: Sequence[int],
        shards: int,
        *,
        step: int,
        steps: int,
        persistent: bool,
        project_upper: Callable[[Params], Params] = lambda upper: upper,
        split: Split = "train",
        variant: Mapping[str, Any] | None = None,
        differentiable: bool = True,
        memory: Params | None = None,
        meanwhile: Callable[[], None] = nothing,
    ) -> None:
        self.task_ids, self.tasks, self.step, self.steps = (
            tuple(task_ids),
            len(task_ids),
            step,
            steps,
        )
        self.persistent, self.project_upper = persistent, project_upper
        self.meanwhile = meanwhile  # called in every round, while it is on its way
        self.seconds = {
            "broadcast_s": 0.0,
            "compute_s": 0.0,
            "reduce_s": 0.0,
        }  # summed over the step's rounds
        self.traffic = Traffic()
        self.memory: LowerGroups = {"memory": memory} if memory else {}
        self.transport, self.split, self.variant, self.differentiable = (
            transport,
            split,
            dict(variant or {}),
            differentiable,
        )
        cuts = np.array_split(np.asarray(task_ids), min(shards, len(task_ids)))
        self.shards = [tuple(int(task) for task in cut) for cut in cuts]

    def __call__(
        self,
        kernel: Kernel,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        keeps: bool = False,
        **arguments: Any,
    ) -> Reduced:
        return self.ask(kernel, solver, upper, lower, {}, keeps, arguments)

    def ask(
        self,
        kernel: Kernel,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        sent: LowerGroups,
        keeps: bool,
        arguments: Mapping[str, Any],
        inner: int | None = None,
    ) -> Reduced:
        """As `Run.__call__`; `sent`: lower groups that all tasks share, sent along with x in place
        of states of the tasks' own; `inner`: on the samples of that inner step.
        """
        groups = {"x": upper, **self.memory, **sent}
        layout, broadcast = self._outgoing(groups, next(iter(upper.values())).dtype)
        calls = [
            self._call(kernel, solver, arguments, lower, keeps, shard, layout, inner)
            for shard in self.shards
        ]
        answer = self.transport.run(broadcast, calls, self.meanwhile)
        start = time.perf_counter()
        assert answer.total is not None, "every call is summed"
        total = Packed(answer.replies[0].reply.sums, answer.total)
        self.traffic.reduces += 1
        self.traffic.bytes_reduced += len(calls) * total.buffer.nbytes
        self.traffic.driver_bytes += answer.driver_bytes
        _check_finite(total)
        sums = unpack(total)
        handles = {
            task: handle
            for shard, reply in zip(self.shards, answer.replies, strict=True)
            for task, handle in zip(
                shard, reply.states, strict=False
            )  # no states where nothing is kept
        }
        self.seconds["broadcast_s"] += answer.broadcast_s
        self.seconds["compute_s"] += answer.compute_s
        self.seconds["reduce_s"] += answer.reduce_s + time.perf_counter() - start
        return Reduced(sums, LowerStates(answer.replies[0].reply.states, handles))

    def _outgoing(self, groups: LowerGroups, dtype: torch.dtype) -> tuple[Layout, Any]:
        """What goes to the workers, and what is in it."""
        return pack(groups, dtype)

    def _call(
        self,
        kernel: Kernel,
        solver: Solver,
        arguments: Mapping[str, Any],
        lower: LowerStates,
        keeps: bool,
        shard: tuple[int, ...],
        sent: Layout,
        inner: int | None,
    ) -> ShardCall:
        present = tuple(task in lower.handles for task in shard)
        request = Request(
            kernel=kernel,
            solver=solver,
            arguments=arguments,
            task_ids=shard,
            step=self.step,
            split=self.split,
            variant=self.variant,
            differentiable=self.differentiable,
            layout=lower.layout,
            with_state=present,
            keeps=keeps,
            sent=sent,
            inner=inner,
        )
        states = tuple(lower.handles[task] for task, has in zip(shard, present, strict=True) if has)
        return ShardCall(
            request, states, len(shard) if keeps else 0, summed=True, kind=kernel.__name__
        )


class SharedRun:
    """Runs kernels of a problem with one y: here, as a stack of one task, whose oracle asks the
    step's blocks through `blocks`.

    `first` has the first block alone.
    """

    def __init__(self, problem: Problem, blocks: StepRun, first: StepRun) -> None:
        self.tasks, self.persistent = 1, True
        self.step, self.steps = blocks.step, blocks.steps
        self.project_upper: Callable[[Params], Params] = problem.project_upper
        self.seconds, self.traffic = blocks.seconds, blocks.traffic
        self._problem, self._blocks, self._first = problem, blocks, first

    def __call__(
        self,
        kernel: Kernel,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        keeps: bool = False,
        **arguments: Any,
    ) -> Reduced:
        groups = _groups(lower)
        oracle = ReducedOracle(self._problem, functools.partial(self._ask, solver, upper))
        result = kernel(solver, oracle, groups, **arguments)
        if not keeps:
            return Reduced(result.sums, LowerStates.none())
        layout, rows = pack_tasks(result.lower)
        row = rows[0].numpy()
        _check_finite(Packed(layout, row))
        return Reduced(result.sums, LowerStates(layout, {SHARED_TASK: row}))

    def update_memory(self, solver: Solver, upper: Params, lower: LowerStates) -> Params:
        """The problem's memory as it is after the step: the sum of the blocks' shares, at their y. Without
        a y, at the one that a run begins with.
        """
        groups = _groups(lower)
        oracle = ReducedOracle(self._problem, functools.partial(self._ask, solver, upper))
        stack = groups["y"] if groups is not None else oracle.init_lower()
        y = {name: tensor[0] for name, tensor in stack.items()}
        sums, _ = self._blocks.ask(
            update_memory, solver, upper, LowerStates.none(), {"y": y}, False, {}
        )
        memory: Params = sums["memory"]
        return memory

    def _ask(
        self,
        solver: Solver,
        upper: Params,
        kernel: Kernel,
        sent: Mapping[str, Params],
        first: bool = False,
        inner: int | None = None,
        **arguments: Any,
    ) -> Sums:
        run = self._first if first else self._blocks
        none = LowerStates.none()
        sums, _ = run.ask(kernel, solver, upper, none, dict(sent), False, arguments, inner)
        return {name: _mean(value, run.tasks) for name, value in sums.items()}


# The number under which the one y of a shared problem is kept.
SHARED_TASK = 0


def _groups(lower: LowerStates) -> LowerGroups | None:
    """What is kept of the one y, as stacks of one; None before the first step."""
    if SHARED_TASK not in lower.handles:
        return None
    groups: LowerGroups = lower.layout.unflatten(lower.handles[SHARED_TASK][None])
    return groups


def _mean(value: Tensor | Params, count: int) -> Tensor | Params:
    return value / count if isinstance(value, Tensor) else tree.scaled(1 / count, value)


def _check_finite(total: Packed) -> None:
    """One check per round, on reduced numbers and before any update."""
    if np.isfinite(total.buffer).all():
        return
    bad = sorted(
        {
            name
            for name, value in unpack(total).items()
            if not all(
                tensor.isfinite().all()
                for tensor in (value.values() if isinstance(value, dict) else [value])
            )
        }
    )
    raise DivergenceError(f"not finite: {', '.join(bad)}")
