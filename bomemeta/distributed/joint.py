"""Which run a step has; and kernels of a shared lower problem that all workers run together: the
request, and the workers' side.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bomemeta.core.problem import Problem, SharedProblem, Split
from bomemeta.core.solver import Kernel, LowerStates, Reduced, Solver
from bomemeta.core.tree import Layout, Params
from bomemeta.distributed.packing import Packed, pack, unpack
from bomemeta.distributed.rounds import SharedRun, StepRun, Traffic
from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import (
    Gather,
    Handle,
    Round,
    ShardCall,
    ShardReply,
    Transport,
    nothing,
)
from bomemeta.distributed.worker import ShardWorker
from bomemeta.errors import ClusterError


def step_run(
    problem: Problem, transport: Transport, ids: Sequence[int], shards: int, **rest: Any
) -> StepRun | SharedRun:
    """The run of a step on these tasks or blocks, with one y or many, as the problem has it; `rest` as for
    StepRun.
    """
    given: dict[str, Any] = {
        "project_upper": problem.project_upper,
        "persistent": problem.num_tasks is not None,
        **rest,
    }
    run = StepRun(transport, ids, shards, **given)
    if not isinstance(problem, SharedProblem):
        return run
    shared = JointRun if transport.collective else SharedRun
    return shared(problem, run, StepRun(transport, ids[:1], 1, **given))


class JointAnswer(NamedTuple):
    """What the first member sends back; the others have computed the same."""

    sums: dict[str, Any]
    lower: LowerStates
    traffic: Traffic


class JointKernel(NamedTuple):
    """Everything about one kernel's run but x and the problem's memory, which are the broadcast
    array.
    """

    kernel: Kernel
    solver: Solver
    arguments: Mapping[str, Any]
    lower: LowerStates
    keeps: bool
    block_ids: tuple[int, ...]
    shards: int
    step: int
    steps: int
    split: Split
    variant: Mapping[str, Any]
    differentiable: bool
    sent: Layout  # what is in the broadcast array

    def execute(
        self, worker: ShardWorker, broadcast: np.ndarray, rank: int, world: int, gather: Gather
    ) -> JointAnswer | None:
        """See `transport.JointRequest`; None from all but the first. Raises ClusterError where the
        members' results differ.
        """
        sent = unpack(Packed(self.sent, broadcast))
        transport = _Gathering(worker, rank, world, gather)
        given: dict[str, Any] = {
            "step": self.step, "steps": self.steps, "persistent": True, "split": self.split, "variant": self.variant,
            "differentiable": self.differentiable, "memory": sent.get("memory"),
        }  # fmt: skip
        run = StepRun(transport, self.block_ids, self.shards, **given)
        shared = SharedRun(
            worker.problem(self.variant), run, StepRun(transport, self.block_ids[:1], 1, **given)
        )
        result = shared(
            self.kernel, self.solver, sent["x"], self.lower, self.keeps, **self.arguments
        )
        _check_agreement(result, gather)
        return JointAnswer(result.sums, result.lower, shared.traffic) if rank == 0 else None


class JointRun(SharedRun):
    """As SharedRun, but the kernel runs on the workers together and not here."""

    def __call__(
        self,
        kernel: Kernel,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        keeps: bool = False,
        **arguments: Any,
    ) -> Reduced:
        blocks = self._blocks
        broadcast = pack({"x": upper, **blocks.memory}, next(iter(upper.values())).dtype)
        request = JointKernel(
            kernel=kernel,
            solver=solver,
            arguments=arguments,
            lower=lower,
            keeps=keeps,
            block_ids=blocks.task_ids,
            shards=len(blocks.shards),
            step=blocks.step,
            steps=blocks.steps,
            split=blocks.split,
            variant=blocks.variant,
            differentiable=blocks.differentiable,
            sent=broadcast.layout,
        )
        blocks.meanwhile()
        started = time.perf_counter()
        answer: JointAnswer = blocks.transport.run_together(
            broadcast.buffer, request, len(blocks.shards)
        )
        self.seconds["compute_s"] += time.perf_counter() - started
        self.traffic.add(answer.traffic)
        self.traffic.driver_bytes += sum(array.nbytes for array in _arrays(answer))
        return Reduced(answer.sums, answer.lower)


class _Gathering:
    """A transport inside a worker: computes the member's own calls and gets the others' shares from
    the other members.
    """

    collective = False
    workers = None

    def __init__(self, worker: ShardWorker, rank: int, world: int, gather: Gather) -> None:
        self._worker, self._rank, self._world, self._gather = worker, rank, world, gather

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        meanwhile()
        numbers = [range(len(calls))]
        if len(calls) > 1:
            numbers = [cut.tolist() for cut in np.array_split(np.arange(len(calls)), self._world)]
        own = numbers[self._rank if len(calls) > 1 else 0]  # one call: everyone computes it
        answers = [self._worker.execute(calls[number].request, broadcast) for number in own]
        shares = [share for _, share in answers]
        total = TreeSum(len(calls))
        if len(calls) > 1:
            most = max(len(cut) for cut in numbers)
            padded = np.stack(shares + [np.zeros_like(shares[0])] * (most - len(shares)))
            everyones = [
                row
                for cut, rows in zip(numbers, self._gather(padded), strict=True)
                for row in rows[: len(cut)]
            ]
        else:
            everyones = shares
        for number, share in enumerate(everyones):
            total.add(number, share)
        return Round([ShardReply(answers[0][0], ())] * len(calls), 0.0, 0.0, 0.0, total.total)

    def run_together(self, broadcast: np.ndarray, request: Any, shards: int) -> Any:
        raise NotImplementedError("a worker asks nobody")

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        return list(handles)

    def guard(self, save: Callable[[], None]) -> None:
        pass

    def show(self, run: str, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _arrays(result: Reduced | JointAnswer) -> Iterator[np.ndarray]:
    for value in result.sums.values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            yield tensor.detach().cpu().numpy()
    yield from result.lower.handles.values()


def _check_agreement(result: Reduced, gather: Gather) -> None:
    """All members went the same way to the same bits. They can differ only where their machines do."""
    digest = hashlib.sha256()
    for array in _arrays(result):
        digest.update(array.tobytes())
    if len({found.tobytes() for found in gather(np.frombuffer(digest.digest(), np.uint8))}) > 1:
        raise ClusterError(
            "reduce: collective: the workers computed different results from the same numbers, as machines with different processors "
            "or libraries do. Use reduce: tree, where each sum is computed once"
        )
