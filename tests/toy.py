"""A data set small enough for tests, and a way to run a solver without a run folder. Also named in
configs' `imports:` by tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bomemeta.core import tree
from bomemeta.core.problem import Problem
from bomemeta.core.solver import LowerStates, Solver, StepResult, take_step
from bomemeta.core.upper import UpperVariable
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.data.labelled import Examples
from bomemeta.distributed.joint import step_run
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.distributed.rounds import SharedRun, StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker, variant_of
from bomemeta.registry import datasets

SIZE = 16


@datasets.register("toy")
@dataclass(kw_only=True)
class Toy:
    """Every class is a plane wave of its own, an image that wave with noise: learnable in a few
    steps.
    """

    root: str | None = None
    classes: int = 40
    noise: float = 0.5

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, SIZE, SIZE

    def prepare(self) -> None:
        rng = np.random.default_rng(7)
        row, column = np.mgrid[0:SIZE, 0:SIZE]
        waves = rng.uniform(-1.5, 1.5, (self.classes, 2))  # radians per pixel, down and across
        phase = waves[:, 0, None, None] * row + waves[:, 1, None, None] * column
        self._patterns = torch.from_numpy(np.sin(phase)[:, None].astype(np.float32) / 2 + 0.5)

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        pass

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        rng = np.random.default_rng(key)
        chosen = torch.from_numpy(self._chosen(spec, rng))

        def images(each: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.arange(spec.ways).repeat_interleave(each)
            noise = torch.from_numpy(
                rng.standard_normal((len(labels), 1, SIZE, SIZE), dtype=np.float32)
            )
            return (self._patterns[chosen[labels]] + self.noise * noise).clamp(0, 1), labels

        return Episode(*images(spec.shots), *images(spec.queries))

    def class_count(self, split: Split, spec: EpisodeSpec) -> int:
        return self.classes

    def class_numbers(
        self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]
    ) -> NDArray[np.int64]:
        return self._chosen(spec, np.random.default_rng(key))

    def _chosen(self, spec: EpisodeSpec, rng: np.random.Generator) -> NDArray[np.int64]:
        return np.sort(rng.choice(self.classes, spec.ways, replace=False))


@datasets.register("toy_labelled")
@dataclass(frozen=True, kw_only=True)
class ToyLabelled:
    """Rows of 6 numbers around 3 class centres: 120 for training, 30 for testing."""

    features: ClassVar[int] = 6
    classes: ClassVar[int] = 3

    def prepare(self) -> None:
        pass

    def examples(self, part: str) -> Examples:
        count, seed = (120, 0) if part == "train" else (30, 1)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % self.classes
        centres = 2 * torch.eye(self.classes, self.features)
        return Examples(
            centres[labels] + torch.randn(count, self.features, generator=generator), labels
        )


def attached(problem: Problem, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """The problem ready for use, on the toy data set where it needs one."""
    data = None
    if problem.needs_data:
        data = Toy()
        data.prepare()
    problem.attach(seed=seed, dtype=dtype, data=data)
    return problem


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bench:
    """Steps a solver on a problem in this process; the state is open to look at."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        steps: int,
        *,
        shards: int = 2,
        task_map: str = "auto",
    ) -> None:
        self.problem, self.solver, self.steps, self.shards = problem, solver, steps, shards
        self.transport = SerialTransport(
            lambda device: ShardWorker(
                lambda changes: variant_of(problem, changes), task_map, device
            )
        )
        self.upper: UpperVariable = solver.start(
            problem.init_upper(torch.Generator().manual_seed(0)), steps
        )
        self.lower = LowerStates.none()
        self.step = 0

    def run(self, task_ids: Sequence[int]) -> StepRun | SharedRun:
        return step_run(
            self.problem, self.transport, task_ids, self.shards, step=self.step, steps=self.steps
        )

    def advance(self, task_ids: Sequence[int] | None = None) -> StepResult:
        ids = task_ids if task_ids is not None else range(self.problem.num_tasks or 4)
        result = take_step(self.solver, self.upper, self.lower, self.run(ids))
        self.lower = result.lower
        self.step += 1
        return result

    def finish(self) -> dict[str, Any]:
        """All steps. Returns the last step's metrics."""
        metrics: dict[str, Any] = {}
        while self.step < self.steps:
            metrics = self.advance().metrics
        return metrics

    def x(self) -> torch.Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in self.upper.params.values()])

    def y(self, task: int = 0) -> torch.Tensor:
        """The task's y as a flat vector."""
        rows = torch.tensor(self.lower.handles[task])[None]
        return tree.flatten(unpack_tasks(PackedTasks(self.lower.layout, rows))["y"])
