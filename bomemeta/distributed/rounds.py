"""The driver's side of a round: cuts a step's tasks into shards, sends x once, adds the replies in shard order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bomemeta.core import tree
from bomemeta.core.problem import Split
from bomemeta.core.solver import Kernel, LowerStates, Reduced, Solver
from bomemeta.core.tree import Params
from bomemeta.distributed.packing import Packed, add_in_order, unpack
from bomemeta.distributed.transport import ShardCall, Transport
from bomemeta.distributed.worker import Request
from bomemeta.errors import DivergenceError


class StepRun:
    """Runs kernels on the tasks of one step (or of an evaluation). `seconds` says where the time went.

    The shards are logical: their number is part of the config, and neither the number of workers nor who computes what changes a bit.
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
    ) -> None:
        self.tasks, self.step, self.steps = len(task_ids), step, steps
        self.persistent, self.project_upper = persistent, project_upper
        self.seconds = {"broadcast_s": 0.0, "compute_s": 0.0, "reduce_s": 0.0}  # summed over the step's rounds
        self._transport, self._split, self._variant, self._differentiable = transport, split, dict(variant or {}), differentiable
        cuts = np.array_split(np.asarray(task_ids), min(shards, len(task_ids)))
        self._shards = [tuple(int(task) for task in cut) for cut in cuts]

    def __call__(
        self,
        kernel: Kernel,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        keeps: bool = False,
        **arguments: Any,
    ) -> Reduced:
        calls = [self._call(kernel, solver, arguments, lower, keeps, shard) for shard in self._shards]
        answer = self._transport.run(tree.flatten(upper).numpy(), calls)
        start = time.perf_counter()
        total = add_in_order([reply.reply.packed for reply in answer.replies])
        _check_finite(total)
        sums = unpack(total)
        handles = {
            task: handle
            for shard, reply in zip(self._shards, answer.replies, strict=True)
            for task, handle in zip(shard, reply.states, strict=False)  # no states where nothing is kept
        }
        self.seconds["broadcast_s"] += answer.broadcast_s
        self.seconds["compute_s"] += answer.compute_s
        self.seconds["reduce_s"] += time.perf_counter() - start
        return Reduced(sums, LowerStates(answer.replies[0].reply.layout, handles))

    def _call(
        self,
        kernel: Kernel,
        solver: Solver,
        arguments: Mapping[str, Any],
        lower: LowerStates,
        keeps: bool,
        shard: tuple[int, ...],
    ) -> ShardCall:
        present = tuple(task in lower.handles for task in shard)
        request = Request(
            kernel=kernel,
            solver=solver,
            arguments=arguments,
            task_ids=shard,
            step=self.step,
            split=self._split,
            variant=self._variant,
            differentiable=self._differentiable,
            layout=lower.layout,
            with_state=present,
            keeps=keeps,
        )
        states = tuple(lower.handles[task] for task, has in zip(shard, present, strict=True) if has)
        return ShardCall(request, states, len(shard) if keeps else 0)


def _check_finite(total: Packed) -> None:
    """One check per round, on reduced numbers and before any update."""
    if np.isfinite(total.buffer).all():
        return
    bad = sorted(
        {
            name
            for name, value in unpack(total).items()
            if not all(tensor.isfinite().all() for tensor in (value.values() if isinstance(value, dict) else [value]))
        }
    )
    raise DivergenceError(f"not finite: {', '.join(bad)}")
