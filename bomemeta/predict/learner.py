"""A few-shot model that was not fitted yet, as a graph: support images, their labels and query images
to logits, the fit included.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bomemeta.errors import ConfigError
from bomemeta.nets.backbones import Conv4, ResNet12
from bomemeta.nets.task_norms import Statistics, TaskNorm
from bomemeta.predict.model import TrainedModel
from bomemeta.predict.task import few_shot
from bomemeta.problems import few_shot_heads as heads


class Learner(nn.Module):
    """(support `[s, C, H, W]`, labels `[s, ways]` one-hot, query `[q, C, H, W]`) to (logits `[q, ways]`,
    the queries' features `[q, d]`). s, ways and q may vary; so may the images of each class, in any
    order. BatchNorms take the support set's statistics, or their own.

    Raises ConfigError for form network, for heads that hundreds of steps solve, and for a solver whose
    steps on g are no plain gradient steps.
    """

    def __init__(self, model: TrainedModel, steps: int | None) -> None:
        super().__init__()
        self._problem = few_shot(model)
        if self._problem.form == "network":
            raise ConfigError(
                "export: a run of `form: network` adapts its whole network to the support set, and is no one graph; "
                "fit it and export the fitted classifier"
            )
        if self._problem.head in ("svm", "logistic"):
            raise ConfigError(
                f"export: head {self._problem.head} is solved by an iteration of hundreds of steps, which is no graph "
                "of a reasonable size; fit it and export the fitted classifier"
            )
        self._upper = model.upper
        self.module = copy.deepcopy(self._problem.module(model.upper)).eval().requires_grad_(False)
        self._takes_rows = isinstance(self.module, Conv4 | ResNet12)
        self._statistics: list[Statistics] = [
            layer.statistics for layer in self.module.modules() if isinstance(layer, TaskNorm)
        ]
        self._steps, self._lr = (0, 0.0)
        if self._problem.head not in heads.SOLVED:
            self._steps, self._lr = _descent(model, steps)

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        count = support.shape[0]
        images = torch.cat([support, query])
        for statistics in self._statistics:
            statistics.rows = count
        features = self.module(images, count) if self._takes_rows else self.module(images)
        for statistics in self._statistics:
            statistics.rows = None
        features = self._problem.scaled_features(self._upper, features)
        known, asked = features[:count], features[count:]
        return self._logits(known, labels.to(known.dtype), asked), asked

    def _logits(self, known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        head, weight = self._problem.head, self._problem.regularisation
        if head in heads.SOLVED:
            solution = heads.solution(head, self._upper, known, labels, weight)
            return heads.with_one(asked) @ solution
        if head == "span":
            known, asked = known @ known.mT, asked @ known.mT
        prior = heads.class_means(known, labels) if head == "prototype" else 0 * (known.mT @ labels)
        found = prior
        for _ in range(self._steps):  # as few_shot_linear.steps_on_g
            logits = known @ found
            force = logits if head == "span" else found - prior
            gradient = known.mT @ (functional.softmax(logits, 1) - labels) / known.shape[0]
            found = found - self._lr * (gradient + weight * force)
        return asked @ found


def _descent(model: TrainedModel, steps: int | None) -> tuple[int, float]:
    """How many steps on g the run's evaluation takes, and their size."""
    solver: Any = model.solver
    lr = getattr(solver, "inner_lr", None)
    chosen = model.config["evaluation"]["inner_steps"] if steps is None else steps
    if chosen is None:
        chosen = getattr(solver, "adapt_steps", 0) + getattr(solver, "inner_steps", 0)
    if lr is None or getattr(solver, "inner_optimizer", "sgd") != "sgd":
        raise ConfigError(
            f"export: solver {type(solver).__name__} takes other steps than gradient steps of inner_lr; fit the "
            "classifier and export that"
        )
    return int(chosen), float(lr)
