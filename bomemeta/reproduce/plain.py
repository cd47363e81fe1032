"""Training y alone: the references that a bilevel method is held against. Not a solver that a
config can name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bomemeta.core import tree
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Loss
from bomemeta.core.solver import (
    KernelResult,
    LowerGroups,
    LowerStates,
    Run,
    Solver,
    StepResult,
    mean_sums,
)
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable


@dataclass(frozen=True, kw_only=True)
class PlainDescent(Solver):
    """Gradient descent with momentum of y on  `on_upper` f + `on_lower` g  at an x whose every
    number is `upper`.
    """

    upper: float
    on_upper: float = 0.0
    on_lower: float = 1.0
    lr: float
    momentum: float = 0.9

    def start(self, upper: Params, steps: int) -> UpperVariable:
        fixed = {name: torch.full_like(tensor, self.upper) for name, tensor in upper.items()}
        return UpperVariable(
            fixed, steps, optimizer="sgd", lr=self.lr, momentum=0.0, schedule="constant"
        )

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(oracle, start or oracle.init_lower(), steps or 0, self.lr)

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(descend)
        return StepResult(
            lower, mean_sums(sums, ("upper_loss", "lower_loss", "gradient_evaluations"), run.tasks)
        )


def descend(solver: PlainDescent, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: one step."""
    y = lower["y"] if lower is not None else oracle.init_lower()
    velocity = (
        tree.scaled(solver.momentum, lower["velocity"]) if lower is not None else tree.zeros_like(y)
    )
    weights: dict[Loss, float] = {"upper": solver.on_upper, "lower": solver.on_lower}
    asked = [
        loss for loss, weight in weights.items() if weight != 0
    ]  # what weighs 0 would cost its gradient all the same
    found = oracle.gradients(*((loss, y) for loss in asked))
    for loss, gradient in zip(asked, found, strict=True):
        velocity = tree.axpy(weights[loss], gradient.lower, velocity)
    values = {
        f"{loss}_loss": gradient.value.sum() for loss, gradient in zip(asked, found, strict=True)
    }
    evaluations = torch.tensor(float(oracle.gradient_evaluations * oracle.tasks))
    moved = oracle.project_lower(tree.axpy(-solver.lr, velocity, y))
    return KernelResult(
        {**values, "gradient_evaluations": evaluations}, {"y": moved, "velocity": velocity}
    )
