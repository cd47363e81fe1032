"""The worker's side of a round, the same for every transport: load the tasks, build the oracle, run
a kernel, pack the sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from bomemeta.allocator import keep_freed_memory
from bomemeta.core import tree
from bomemeta.core.arguments import replaced
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Problem, SharedProblem, Split
from bomemeta.core.randomness import Draws
from bomemeta.core.reduced_oracle import ADDITIVE
from bomemeta.core.solver import Kernel, KernelResult, LowerGroups, Solver
from bomemeta.core.spans import LOAD, span
from bomemeta.core.task_map import TaskMap
from bomemeta.core.tree import Layout
from bomemeta.distributed.packing import Packed, PackedTasks, pack, pack_tasks, unpack, unpack_tasks
from bomemeta.errors import DataError
from bomemeta.global_random import seeded

SHOWN = 5  # tasks that a message names


class Request(NamedTuple):
    """Everything about one shard's work but the arrays."""

    kernel: Kernel  # module-level: pickled by name
    solver: Solver
    arguments: Mapping[str, Any]
    task_ids: tuple[int, ...]
    step: int
    split: Split
    variant: Mapping[str, Any]  # problem fields that differ from the config's
    differentiable: bool
    layout: Layout  # what is in a state array
    with_state: tuple[bool, ...]  # which of the tasks come with a state array
    keeps: bool  # whether the kernel's lower groups are returned, one array per task
    # what is in the broadcast array: x, the problem's memory, and lower groups that all tasks share
    sent: Layout
    inner: int | None = None  # the inner step whose samples are meant; None: the step's


class Asked(NamedTuple):
    """What a load depends on beside the seed."""

    task_ids: tuple[int, ...]
    step: int
    split: Split
    variant: str


class Computing(NamedTuple):
    """How the worker computes what the problem says; both change bits."""

    dtype: torch.dtype | None = None  # of forward and backward passes; None: the problem's
    micro_batch: int | None = None  # samples of a block at once; None: all of them


class ShardSums(NamedTuple):
    """A shard's reply: what is in its share of the sum, and in each returned state array."""

    sums: Layout
    states: Layout


class _Given(NamedTuple):
    """What a problem gave for some tasks when they were last asked for."""

    step: int
    batch: tree.Params
    moved: tree.Params | None  # the same on the worker's device


class ShardWorker:
    """Runs requests for one problem. Stateless between calls but for caches."""

    def __init__(
        self,
        build_problem: Callable[[Mapping[str, Any]], Problem],
        task_map: str,
        device: str,
        computing: Computing | None = None,
    ) -> None:
        keep_freed_memory()
        if device != "cpu":
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # `_repeatable` wants it, before cuBLAS is first used
        self._build, self._computing = build_problem, computing or Computing()
        self._device = torch.device(device)
        self._task_map: TaskMap = (
            "loop" if task_map == "loop" or (task_map == "auto" and device == "cpu") else "vmap"
        )
        self._problems: dict[str, Problem] = {}
        self._given: dict[Asked, _Given] = {}
        self.problem({})  # what is wrong with it shows before the first step

    def execute(
        self, request: Request, broadcast: np.ndarray | LowerGroups, *states: np.ndarray
    ) -> tuple[Any, ...]:
        """See `transport.Worker`. `broadcast` may be the groups themselves, where the caller is in
        this process.
        """
        drawn = (request.step, request.split, *request.task_ids)
        with _repeatable(), seeded(self.problem(request.variant).seed, *drawn):
            return self._execute(request, broadcast, *states)

    def _execute(
        self, request: Request, broadcast: np.ndarray | LowerGroups, *states: np.ndarray
    ) -> tuple[Any, ...]:
        problem = self.problem(request.variant)
        if isinstance(broadcast, dict):
            sent = {group: self._moved(params) for group, params in broadcast.items()}
        else:
            sent = unpack(Packed(request.sent, broadcast), self._device)
        with span(LOAD):
            batch = self._batch(request)
        if "memory" in sent:
            batch |= _repeated({"memory": sent.pop("memory")}, len(request.task_ids))["memory"]
        x, size = sent.pop("x"), self._computing.micro_batch
        if size is not None and request.kernel in ADDITIVE:
            assert isinstance(problem, SharedProblem), "build_problem refuses others"
            parts = [
                self._computed(problem, request, part, x, sent, states, number)
                for number, part in enumerate(problem.micro_batches(batch, size))
            ]
        else:
            parts = [self._computed(problem, request, batch, x, sent, states)]
        result = parts[0]
        sums = pack(result.sums, problem.dtype)
        for part in parts[1:]:
            sums.buffer[:] += pack(part.sums, problem.dtype).buffer
        if not np.isfinite(sums.buffer).all():
            _blame_data(request, batch)
        if not request.keeps:
            return ShardSums(sums.layout, Layout()), sums.buffer
        layout, rows = pack_tasks(result.lower)
        return ShardSums(sums.layout, layout), sums.buffer, *(row.numpy().copy() for row in rows)

    def _computed(
        self,
        problem: Problem,
        request: Request,
        batch: tree.Params,
        x: tree.Params,
        sent: LowerGroups,
        states: tuple[np.ndarray, ...],
        part: int = 0,
    ) -> KernelResult:
        split = f"{request.split} {part}" if part else request.split
        oracle = LocalOracle(
            problem,
            x,
            batch,
            self._task_map,
            request.differentiable,
            self._computing.dtype,
            Draws(problem.seed, request.step, split, request.task_ids),
        )
        lower = (
            _repeated(sent, oracle.tasks) if sent else self._unpack_lower(oracle, request, states)
        )
        return request.kernel(request.solver, oracle, lower, **request.arguments)

    def _batch(self, request: Request) -> tree.Params:
        asked = Asked(request.task_ids, request.step, request.split, _key(request.variant))
        if request.inner is not None:
            problem = self._problems[asked.variant]
            assert isinstance(problem, SharedProblem), "no other has inner batches"
            return self._moved(problem.load_inner(asked.task_ids, asked.step, request.inner))
        problem = self._problems[asked.variant]
        return self._here(asked, problem.load(asked.task_ids, asked.step, asked.split))

    def _here(self, asked: Asked, batch: tree.Params) -> tree.Params:
        """The batch on the worker's device. What a problem gives again for the same tasks, the very
        same, has not changed: from the second time on it stays there, as long as every step asks
        for it. Fresh tasks do not.
        """
        if self._device.type == "cpu":
            return dict(batch)
        tasks = asked._replace(step=0)
        before, kept = self._given.get(tasks), None
        if before is not None and before.batch is batch:
            kept = before.moved or self._moved(batch)
        self._given[tasks] = _Given(asked.step, batch, kept)
        for old in [tasks for tasks, given in self._given.items() if given.step < asked.step - 1]:
            del self._given[old]
        return dict(kept or self._moved(batch))

    def _moved(self, batch: tree.Params) -> tree.Params:
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def problem(self, variant: Mapping[str, Any]) -> Problem:
        """The problem, with these fields changed."""
        key = _key(variant)
        if key not in self._problems:
            self._problems[key] = self._build(variant)
        return self._problems[key]

    def _unpack_lower(
        self, oracle: LocalOracle, request: Request, states: tuple[np.ndarray, ...]
    ) -> LowerGroups | None:
        """State arrays into stacks. A task that is met for the first time starts at
        `init_lower`, other groups at 0.
        """
        if not states:
            return None
        arrays = iter(states)
        rows = torch.zeros(len(request.task_ids), len(states[0]), dtype=oracle.problem.dtype)
        for i, present in enumerate(request.with_state):
            if present:
                rows[i] = torch.tensor(next(arrays), dtype=rows.dtype)
        groups = unpack_tasks(PackedTasks(request.layout, rows.to(self._device)))
        if not all(request.with_state):
            known = torch.tensor(request.with_state, device=self._device)
            for name, start in oracle.init_lower().items():
                groups["y"][name][~known] = start[~known]
        return groups


@contextmanager
def _repeatable() -> Iterator[None]:
    """Torch's deterministic algorithms: some of the others add in another order each time, on a GPU
    and with threads.

    Where there is none, torch says so once, with the operation's name. What was set before comes
    back: this may be a user's process.
    """
    memory: Any = torch.utils.deterministic
    mode, fills, tries = (
        torch.get_deterministic_debug_mode(),
        memory.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.set_deterministic_debug_mode(max(mode, 1))
    memory.fill_uninitialized_memory = (
        False  # it costs a pass over every new tensor, and nothing reads one unwritten
    )
    torch.backends.cudnn.benchmark = False  # it takes what was fastest in this process
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tries


def _blame_data(request: Request, batch: tree.Params) -> None:
    """Raises DataError where a sum is not finite because the tasks' data was not."""
    found = []
    for name, tensor in batch.items():
        if not tensor.is_floating_point():
            continue
        rows = (~tensor.isfinite().reshape(len(tensor), -1).all(1)).nonzero()[:, 0].tolist()
        if rows:
            tasks = ", ".join(str(request.task_ids[row]) for row in rows[:SHOWN])
            found.append(f"{name} (task {tasks}{', ...' if len(rows) > SHOWN else ''})")
    if found:
        raise DataError(
            f"step {request.step}: the data of split {request.split} has NaN or infinite numbers: {', '.join(found)}. Wanted finite "
            "numbers; no step size is to blame"
        )


def _key(variant: Mapping[str, Any]) -> str:
    return repr(sorted(variant.items()))


def _repeated(groups: LowerGroups, tasks: int) -> LowerGroups:
    """Groups that all tasks share as stacks, without copies."""
    return {
        group: {name: tensor.expand(tasks, *tensor.shape) for name, tensor in params.items()}
        for group, params in groups.items()
    }


def variant_of(problem: Problem, changes: Mapping[str, Any]) -> Problem:
    """The same problem with some fields changed, attached to the same run."""
    if not changes:
        return problem
    other = replaced(problem, changes)
    with seeded(problem.seed, "setup"):
        other.attach(seed=problem.seed, dtype=problem.dtype, data=problem.data)
    return other
