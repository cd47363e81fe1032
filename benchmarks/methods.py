"""The methods that are compared: bomemeta's BOME on few-shot heads, learn2learn's MAML and ANIL.

All three get the same `FewShot` problem, and with it the same episodes by number, the same images
in [0, 1] and the same backbone with the same initial weights. They differ in what they do with
them.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bomemeta.core.inner import evaluate
from bomemeta.core.problem import Batch, Split
from bomemeta.core.solver import LowerStates, take_step
from bomemeta.core.upper import schedule_factor
from bomemeta.data.l2l_tasksets import learn2learn
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker, variant_of
from bomemeta.intervals import half_width
from bomemeta.nets import build_backbone
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.bome import BOME

UPPER_LR = 3e-3  # Adam's, where nothing else is said
ADAPT_STEPS = 5
EPISODES_AT_ONCE = 10  # in evaluation: bounds the memory
CLOCK = 10_000  # the ticks of a budget: how finely a step-size schedule follows it
# The step of adaptation of MAML and ANIL, the better one of 0.1 and 0.4 on 100 validation episodes
# after 45 CPU-seconds of 5-way 1-shot Omniglot, 32 filters: MAML 80.2 against 70.5 %, ANIL 89.1
# against 85.2 %.
PEERS_INNER_LR = 0.1


class Accuracy(NamedTuple):
    """Mean over episodes and the half-width of its 95 % confidence interval, as shares."""

    mean: float
    ci95: float


class Settings(Protocol):
    """What a method is told from the command line."""

    seed: int
    schedule: str  # cosine or constant
    inner_lr: float | None  # None: the method's own
    upper_lr: float


class Method(Protocol):
    hyperparameters: dict[str, Any]

    def step(self, task_ids: Sequence[int], elapsed: float) -> None:
        """One meta-step on these training episodes; `elapsed` in [0, 1] is how much of the budget
        is used.
        """
        ...

    def accuracy(self, split: Split, episodes: int) -> Accuracy:
        """On the split's first `episodes` episodes, 15 queries per class."""
        ...


class Bome:
    """bomemeta's head form: x = the backbone, y = a linear head per episode with a prototype prior;
    serial transport, two shards.
    """

    shards = 2

    def __init__(self, problem: FewShot, settings: Settings) -> None:
        inner_lr = settings.inner_lr or 0.2
        self._solver = BOME(
            inner_steps=5,
            # 1 / (4 + regularisation): 4 bounds the curvature of the support loss of normalised
            # features of length 4, 2 classes
            inner_lr=inner_lr,
            lower_lr=inner_lr,
            upper_lr=settings.upper_lr,
            upper_optimizer="adam",
            upper_schedule="cosine" if settings.schedule == "cosine" else "constant",
            barrier="per_task",
            adapt_steps=ADAPT_STEPS,
            barrier_steps=5,
            diagnose_every=0,
        )
        self._transport = SerialTransport(
            lambda device: ShardWorker(lambda changes: variant_of(problem, changes), "auto", device)
        )
        self._upper = self._solver.start(
            problem.init_upper(torch.Generator().manual_seed(settings.seed)), CLOCK
        )
        problem_fields = {
            name: getattr(problem, name)
            for name in ("form", "head", "regularisation", "feature_scale", "batch_norm")
        }
        self.hyperparameters = dataclasses.asdict(self._solver) | problem_fields

    def step(self, task_ids: Sequence[int], elapsed: float) -> None:
        # The schedule's step is the tick of the budget and not the number of the meta-step, which
        # is not known beforehand.
        run = StepRun(
            self._transport,
            task_ids,
            self.shards,
            step=int(elapsed * CLOCK),
            steps=CLOCK,
            persistent=False,
        )
        take_step(self._solver, self._upper, LowerStates.none(), run)

    def accuracy(self, split: Split, episodes: int) -> Accuracy:
        shards = math.ceil(episodes / EPISODES_AT_ONCE)
        run = StepRun(
            self._transport,
            range(episodes),
            shards,
            step=0,
            steps=CLOCK,
            persistent=False,
            split=split,
            differentiable=False,
        )
        sums, _ = run(evaluate, self._solver, self._upper.params, LowerStates.none(), steps=None)
        return _summary(float(sums["sum/accuracy"]), float(sums["square/accuracy"]), episodes)


class _LearnToLearn(ABC):
    """What MAML and ANIL share: Adam on a module, the mean of the tasks' query losses. One task
    after the other, as its examples do.
    """

    first_order = False

    def __init__(self, problem: FewShot, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        channels, height, width = problem.data.image_shape
        self._problem, self._schedule = (
            problem,
            "cosine" if settings.schedule == "cosine" else "constant",
        )
        self._inner_lr, self._upper_lr = settings.inner_lr or PEERS_INNER_LR, settings.upper_lr
        self._backbone = build_backbone(problem.backbone, channels, problem.width, generator)
        with torch.no_grad():
            features = self._backbone(torch.zeros(1, channels, height, width)).shape[1]
        torch.manual_seed(
            settings.seed
        )  # the linear layer draws its default initialisation from the global state
        self._head = nn.Linear(features, problem.ways)
        self.hyperparameters: dict[str, Any] = {
            "inner_lr": self._inner_lr,
            "adapt_steps": ADAPT_STEPS,
            "first_order": self.first_order,
            "upper_optimizer": "adam",
            "upper_lr": self._upper_lr,
            "upper_schedule": self._schedule,
            "batch_norm": "transductive",
        }

    def _start(self, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer = torch.optim.Adam(parameters, lr=self._upper_lr)

    @abstractmethod
    def query_logits(self, task: Batch, first_order: bool) -> Tensor:
        """Of one task's queries, [n, ways], after adaptation to its support set."""

    def step(self, task_ids: Sequence[int], elapsed: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._upper_lr * schedule_factor(
                self._schedule, int(elapsed * CLOCK), CLOCK
            )  # type: ignore[arg-type]
        self._optimizer.zero_grad()
        for task in _tasks(self._problem, task_ids, "train"):
            loss = functional.cross_entropy(
                self.query_logits(task, self.first_order), task["query_labels"]
            )
            (loss / len(task_ids)).backward()
        self._optimizer.step()

    def accuracy(self, split: Split, episodes: int) -> Accuracy:
        total = squares = 0.0
        for first in range(0, episodes, EPISODES_AT_ONCE):
            for task in _tasks(
                self._problem, range(first, min(first + EPISODES_AT_ONCE, episodes)), split
            ):
                # Adapted weights are the same to first order; their graph is not needed.
                hits = self.query_logits(task, True).argmax(1) == task["query_labels"]
                accuracy = float(hits.double().mean())
                total, squares = total + accuracy, squares + accuracy**2
        return _summary(total, squares, episodes)


class Maml(_LearnToLearn):
    """learn2learn's MAML, second order: the whole network adapts. BatchNorm statistics of the
    support set while adapting, then of the queries: what learn2learn's examples do.
    """

    def __init__(self, problem: FewShot, settings: Settings) -> None:
        super().__init__(problem, settings)
        self._maml = learn2learn().algorithms.MAML(
            nn.Sequential(self._backbone, self._head), lr=self._inner_lr
        )
        self._start(list(self._maml.parameters()))

    def query_logits(self, task: Batch, first_order: bool) -> Tensor:
        learner = self._maml.clone(first_order=first_order)
        for _ in range(ADAPT_STEPS):
            learner.adapt(
                functional.cross_entropy(learner(task["support"]), task["support_labels"])
            )
        logits: Tensor = learner(task["query"])
        return logits


class FirstOrderMaml(Maml):
    """The same without the second derivatives."""

    first_order = True


class Anil(_LearnToLearn):
    """learn2learn's ANIL: features of support and queries once and together, MAML on the head
    alone, as in its examples.
    """

    def __init__(self, problem: FewShot, settings: Settings) -> None:
        super().__init__(problem, settings)
        self._maml = learn2learn().algorithms.MAML(self._head, lr=self._inner_lr)
        self._start([*self._backbone.parameters(), *self._maml.parameters()])

    def query_logits(self, task: Batch, first_order: bool) -> Tensor:
        with torch.set_grad_enabled(not first_order):
            features = self._backbone(torch.cat([task["support"], task["query"]]))
        support, query = features[: len(task["support"])], features[len(task["support"]) :]
        learner = self._maml.clone(first_order=first_order)
        for _ in range(ADAPT_STEPS):
            learner.adapt(functional.cross_entropy(learner(support), task["support_labels"]))
        logits: Tensor = learner(query)
        return logits


METHODS = {"bome": Bome, "maml": Maml, "fomaml": FirstOrderMaml, "anil": Anil}


def _tasks(problem: FewShot, task_ids: Sequence[int], split: Split) -> list[Batch]:
    stack = problem.load(task_ids, 0, split)
    return [{name: tensor[i] for name, tensor in stack.items()} for i in range(len(task_ids))]


def _summary(total: float, squares: float, episodes: int) -> Accuracy:
    mean = total / episodes
    variance = (squares / episodes - mean**2) * episodes / max(episodes - 1, 1)
    return Accuracy(mean, half_width(variance, episodes) or math.nan)
