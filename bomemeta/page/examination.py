"""Test episodes, or the test part, once more with the run's own evaluation: what was taken for what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomemeta.assembly import build_problem, build_solver, trainer_of
from bomemeta.checkpoint import Checkpoint
from bomemeta.checkpoint_content import check_fits
from bomemeta.config import Config
from bomemeta.core.inner import evaluate
from bomemeta.core.problem import Problem, SharedProblem
from bomemeta.core.solver import KernelResult, LowerStates
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.distributed.rounds import StepRun
from bomemeta.engine import Trainer
from bomemeta.evaluation import EVALUATION_SHARD
from bomemeta.intervals import half_width
from bomemeta.limits import within_memory
from bomemeta.problems.few_shot import FewShot
from bomemeta.problems.few_shot_report import Pictures, class_names, embedded, pictures

SHOWN = 2  # episodes shown of the worst, and of the best


class Tested(NamedTuple):
    """One test episode, or one block of a test part."""

    task: int
    predicted: list[int]
    true: list[int]
    loss: float  # nan where the problem gives none
    names: list[str] | None  # of classes 0, 1, ...; None: not known

    @property
    def accuracy(self) -> float:
        hits = sum(a == b for a, b in zip(self.predicted, self.true, strict=True))
        return hits / max(len(self.true), 1)


class Embedding(NamedTuple):
    """The features of one test episode's images."""

    features: Tensor  # [n, d]
    labels: list[int]
    names: list[str]


@dataclass
class Examination:
    """What was tested again. Without `tested` there is nothing to count, and `why` says why."""

    episodes: int = 0  # 0: a test part and no episodes
    tested: list[Tested] = field(default_factory=list)
    pictures: dict[int, Pictures] = field(default_factory=dict)  # of `worst` and `best`
    embedding: Embedding | None = None
    why: str = ""

    @property
    def accuracy(self) -> tuple[float, float | None]:
        """The mean over episodes and the half-width of its 95 % interval; of a test part the share of
        right samples.
        """
        if not self.episodes:
            right = sum(a == b for one in self.tested for a, b in zip(one.predicted, one.true, strict=True))  # fmt: skip
            return right / max(sum(len(one.true) for one in self.tested), 1), None
        values = [one.accuracy for one in self.tested]
        mean, n = math.fsum(values) / len(values), len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1)
        return mean, half_width(variance, n)

    def ordered(self) -> list[Tested]:
        """Episodes from the worst to the best: by accuracy, and by loss where that is equal."""
        return sorted(self.tested, key=lambda one: (one.accuracy, -one.loss))

    @property
    def worst(self) -> list[Tested]:
        return self.ordered()[:SHOWN]

    @property
    def best(self) -> list[Tested]:
        return self.ordered()[SHOWN:][-SHOWN:][::-1]

    def confusion(self) -> Counter[tuple[str, str]] | None:
        """How often a sample of the first class was taken for the second, by their names. None where
        the classes of episodes are not known: their labels mean another class in each.
        """
        found: Counter[tuple[str, str]] = Counter()
        for one in self.tested:
            if one.names is None:
                return None
            for true, predicted in zip(one.true, one.predicted, strict=True):
                found[one.names[true], one.names[predicted]] += 1
        return found


def examine(
    settings: Config, checkpoint: Checkpoint, episodes: int, say: Callable[[str], None]
) -> Examination:
    """Tests the checkpoint in this process: the first `episodes` test episodes of the run's own
    evaluation, or the whole test part of a problem with one y. Raises what `bomemeta eval` raises.
    """
    here = {"workers": 0, "device": "cpu" if settings.device == "cpu" else "auto"}
    settings = settings.model_copy(update=here)
    problem = build_problem(settings)
    if type(problem).classified is Problem.classified:
        return Examination(why="The problem is no classification.")
    solver = build_solver(settings, problem)
    with (
        within_memory(settings.to_dict(), limited=False),
        trainer_of(settings, say, problem=problem, solver=solver) as trainer,
    ):
        state = trainer.state
        check_fits(checkpoint, problem, state.upper, state.memory, settings.tasks_per_step)
        trainer.restore(checkpoint)
        if isinstance(problem, SharedProblem):
            say("testing the whole test part")
            return _of_part(trainer, problem)
        if not problem.meta_tests:
            return Examination(why="The problem has no test tasks.")
        say(f"testing {episodes} test episodes")
        return _of_episodes(trainer, problem, episodes)


def _of_episodes(trainer: Trainer, problem: Problem, episodes: int) -> Examination:
    seen = _Seen(problem)
    run = trainer.run_on(
        range(episodes),
        math.ceil(episodes / EVALUATION_SHARD),
        step=0,
        persistent=False,
        split="test",
        differentiable=False,
    )
    upper, steps = trainer.state.upper.averaged, trainer.config.evaluation.inner_steps
    run(seen.kernel, trainer.solver, upper, LowerStates.none(), steps=steps)
    found = Examination(episodes, seen.tested)
    if isinstance(problem, FewShot):
        found.embedding = seen.embedding
        for one in [*found.worst, *found.best]:
            if (images := pictures(problem, one.task)) is not None:
                found.pictures[one.task] = images
    return found


def _of_part(trainer: Trainer, problem: SharedProblem) -> Examination:
    seen, state = _Seen(problem), trainer.state
    y = {}
    if state.lower.handles:  # else the run stands at its start
        rows = torch.tensor(trainer.transport.fetch(list(state.lower.handles.values())[:1])[0])
        unpacked = unpack_tasks(PackedTasks(state.lower.layout, rows[None]))["y"]
        y = {"y": {name: tensor[0] for name, tensor in unpacked.items()}}
    run = StepRun(
        trainer.transport,
        range(problem.num_blocks),
        problem.num_blocks,
        step=state.step,
        steps=trainer.steps,
        persistent=False,
        split="test",
        differentiable=False,
        memory=state.memory,
    )
    run.ask(seen.kernel, trainer.solver, state.upper.averaged, LowerStates.none(), y, False, {"steps": 0})  # fmt: skip
    return Examination(0, seen.tested)


class _Seen:
    """What a kernel in this process saw, task by task, in the order of the tasks."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.tested: list[Tested] = []
        self.embedding: Embedding | None = None

    def kernel(self, solver: Any, oracle: Any, lower: Any, *, steps: int | None) -> KernelResult:
        """As `evaluate`, which it calls, at the same y."""
        at = lower["y"] if lower is not None else None
        if at is None:  # 0 steps: a shared y at the run's start
            at = oracle.init_lower() if steps == 0 else solver.adapt(oracle, steps)
        with torch.no_grad():
            for row in range(oracle.tasks):
                self._note(oracle, at, row)
        return evaluate(solver, oracle, {"y": at}, steps=steps)

    def _note(self, oracle: Any, at: Any, row: int) -> None:
        problem, task = self._problem, len(self.tested)
        encodes = problem.encodes
        encoded = {name: t[row] if encodes else t for name, t in oracle.encoded.items()}
        own = {name: tensor[row] for name, tensor in at.items()}
        batch = {name: tensor[row] for name, tensor in oracle.batch.items()}
        pair = problem.classified(encoded, own, batch)
        assert pair is not None, "examine asked"
        predicted, true = (tensor.tolist() for tensor in pair)
        loss, names = math.nan, None
        if isinstance(problem, SharedProblem):
            names = _names_of_rows(problem, [*predicted, *true])
        else:
            loss = float(problem.upper_loss(encoded, own, batch))
        if isinstance(problem, FewShot):
            names = class_names(problem, task)
            if task == 0:
                labels = [*batch["support_labels"].tolist(), *batch["query_labels"].tolist()]
                shown = names or [f"class {label} of the episode" for label in sorted({*labels})]
                features = embedded(problem, oracle.x, own, batch).cpu()
                self.embedding = Embedding(features, labels, shown)
        self.tested.append(Tested(task, predicted, true, loss, names))


def _names_of_rows(problem: Problem, labels: list[int]) -> list[str]:
    """What the data set calls its classes, or their numbers."""
    count = max(labels, default=-1) + 1
    names = getattr(problem.data, "class_names", None)
    if names is None or callable(names) or len(names) < count:
        return [str(number) for number in range(count)]
    return [str(name) for name in names]
