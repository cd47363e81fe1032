"""Which run a step has; and kernels of a shared lower problem that all workers run together: the
request, and the workers' side. y and what is kept with it stays with them (`resident.py`).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bomemeta.core.inner import update_memory
from bomemeta.core.problem import Problem, SharedProblem, Split
from bomemeta.core.solver import Kernel, LowerGroups, LowerStates, Reduced, Solver, Sums
from bomemeta.core.tree import Layout, Params
from bomemeta.distributed.packing import Packed, pack, unpack
from bomemeta.distributed.resident import Kept, Resident
from bomemeta.distributed.rounds import SHARED_TASK, SharedRun, StepRun, Traffic
from bomemeta.distributed.slices import Peers, SlicedSum, gathered, parts
from bomemeta.distributed.transport import (
    Handle,
    Round,
    ShardCall,
    ShardReply,
    Transport,
    nothing,
)
from bomemeta.distributed.worker import ShardWorker
from bomemeta.errors import ClusterError

FOLD = 4096  # bytes
ALIGNMENT = 64  # bytes: where torch puts a tensor of its own


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
    layout: Layout  # of what the members keep
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
        self, worker: ShardWorker, broadcast: np.ndarray, peers: Peers, kept: Kept, name: str
    ) -> JointAnswer | None:
        """See `transport.JointRequest`; None from all but the first. Raises ClusterError where the
        members' results differ, LowerStateLost where none has the y that the kernel starts from.
        """
        sent = unpack(Packed(self.sent, broadcast))
        transport, before = _Together(worker, peers), peers.sent_bytes
        given: dict[str, Any] = {
            "step": self.step, "steps": self.steps, "persistent": True, "split": self.split, "variant": self.variant,
            "differentiable": self.differentiable, "memory": sent.get("memory"),
        }  # fmt: skip
        run = _MemberRun(transport, self.block_ids, self.shards, **given)
        problem = worker.problem(self.variant)
        shared = SharedRun(problem, run, _MemberRun(transport, self.block_ids[:1], 1, **given))
        lower = self._lower(problem.dtype, kept, peers)
        if self.kernel is update_memory:
            memory = shared.update_memory(self.solver, sent["x"], lower)
            result = Reduced({"memory": memory}, LowerStates.none())
        else:
            result = shared(
                self.kernel, self.solver, sent["x"], lower, self.keeps, **self.arguments
            )
        shared.traffic.exchanged_bytes = peers.sent_bytes - before
        _check_agreement(result, peers)
        if self.keeps:
            kept.put(name, result.lower.handles[SHARED_TASK])
        if peers.rank > 0:
            return None
        return JointAnswer(result.sums, result.lower.layout, shared.traffic)

    def _lower(self, dtype: torch.dtype, kept: Kept, peers: Peers) -> LowerStates:
        """With numbers in place of a handle."""
        handle = self.lower.handles.get(SHARED_TASK)
        if not isinstance(handle, Resident):
            return self.lower
        size = sum(math.prod(entry.shape) for entry in self.lower.layout)
        row = kept.take(handle.name, size, torch.empty(0, dtype=dtype).numpy().dtype, peers)
        return LowerStates(self.lower.layout, {SHARED_TASK: row})


class JointRun(SharedRun):
    """As SharedRun, but the kernel runs on the workers together and not here, and what it keeps stays
    with them.
    """

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
        answer: JointAnswer
        answer, handle = blocks.transport.run_together(
            broadcast.buffer, request, len(blocks.shards)
        )
        self.seconds["compute_s"] += time.perf_counter() - started
        self.traffic.add(answer.traffic)
        self.traffic.driver_bytes += sum(array.nbytes for array in _arrays(answer.sums))
        handles = {SHARED_TASK: handle} if keeps else {}
        return Reduced(answer.sums, LowerStates(answer.layout, handles))

    def update_memory(self, solver: Solver, upper: Params, lower: LowerStates) -> Params:
        memory: Params = self(update_memory, solver, upper, lower).sums["memory"]
        return memory


class _MemberRun(StepRun):
    """What is asked of the member's own worker goes there as it is, and not through a flat array."""

    def _outgoing(self, groups: LowerGroups, dtype: torch.dtype) -> tuple[Layout, Any]:
        return Layout(), {
            group: {name: _as_unpacked(tensor, dtype) for name, tensor in params.items()}
            for group, params in groups.items()
        }


def _as_unpacked(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor, or a copy where it is part of another: see `packing.unpack`."""
    tensor = tensor.detach().to(dtype)
    whole = tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


class _Together:
    """A transport inside a worker: computes the member's own calls, and adds its own and the others'
    shares with the other members.
    """

    collective = False
    workers = None

    def __init__(self, worker: ShardWorker, peers: Peers) -> None:
        self._worker, self._peers = worker, peers

    def run(
        self,
        broadcast: Any,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        meanwhile()
        if len(calls) == 1:  # everyone computes it
            reply, total = self._worker.execute(calls[0].request, broadcast)
            return Round([ShardReply(reply, ())], 0.0, 0.0, 0.0, total)
        shares = SlicedSum(self._peers, len(calls))
        for number in parts(len(calls), self._peers.world)[self._peers.rank]:
            reply, share = self._worker.execute(calls[number].request, broadcast)
            shares.add(number, share)
            del share  # it is added to the next one's
        return Round([ShardReply(reply, ())] * len(calls), 0.0, 0.0, 0.0, shares.total())

    def run_together(
        self, broadcast: np.ndarray, request: Any, shards: int
    ) -> tuple[Any, Resident]:
        raise NotImplementedError("a worker asks nobody")

    def fetch(self, handles: Sequence[Handle]) -> list[np.ndarray]:
        return list(handles)

    def guard(self, save: Callable[[], None]) -> None:
        pass

    def show(self, run: str, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _arrays(sums: Sums) -> Iterator[np.ndarray]:
    for value in sums.values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            yield tensor.detach().cpu().numpy()


def _check_agreement(result: Reduced, peers: Peers) -> None:
    """All members went the same way to the same bits. They can differ only where their machines do."""
    digest = hashlib.sha256()
    for array in (*_arrays(result.sums), *result.lower.handles.values()):
        digest.update(_folded(array))
    own = np.frombuffer(bytearray(digest.digest()), np.uint8)
    if len({found.tobytes() for found in gathered(peers, own)}) > 1:
        raise ClusterError(
            "reduce: collective: the workers computed different results from the same numbers, as machines with different processors "
            "or libraries do. Use reduce: tree, where each sum is computed once"
        )


def _folded(array: np.ndarray) -> bytes:
    """Enough of an array's bits to tell it from one that other arithmetic made; SHA-256 of all takes
    as long as adding them.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    size = len(bits) // FOLD * FOLD
    folded: np.ndarray = np.bitwise_xor.reduce(bits[:size].view(np.uint64).reshape(-1, FOLD // 8))
    return folded.tobytes() + bits[size:].tobytes()
