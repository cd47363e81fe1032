"""Gradient descent of y on g alone, x standing still: the plain baselines of continual learning,
whose remedy is in g.

y <- y - inner_lr grad_y g(x, y),  `inner_steps` times
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Problem
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
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.solvers.lower_options import LowerOptions

Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]

MEANS = ("lower_loss", "upper_loss", "gradient_evaluations")


@solvers.register("lower_only")
@dataclass(frozen=True, kw_only=True)
class LowerOnly(LowerOptions, Solver):
    """y on g alone; x stays where it starts. For fine-tuning, replay, DER++, EWC and joint training
    of problem `continual`.
    """

    inner_steps: Steps = 1
    inner_lr: Positive = 0.1

    def check(self, problem: Problem) -> None:
        if problem.num_tasks is None:
            raise ConfigError(
                "solver: lower_only and agem move y alone, and the y of fresh tasks are forgotten after their step: nothing would be "
                "learned. Take a problem whose y persists, or another solver"
            )

    def start(self, upper: Params, steps: int) -> UpperVariable:
        return UpperVariable(
            upper, steps, optimizer="sgd", lr=0.0, momentum=0.0, schedule="constant"
        )

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.inner_steps if steps is None else steps,
            self.inner_lr,
        )

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(descend)
        return StepResult(lower, mean_sums(sums, MEANS, run.tasks))


def descend(solver: LowerOnly, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: the steps of y. `lower_loss` is g where they began."""
    at = lower["y"] if lower is not None else oracle.init_lower()
    rule, values = solver.lower_rule(), []
    state = rule.state(lower, at)
    for number in range(solver.inner_steps):
        with oracle.inner_batch(number):
            g = oracle.lower(at)
        values.append(g.value)
        moved, state = rule.move(at, g.lower, solver.inner_lr, state)
        at = oracle.project_lower(moved)
    evaluations = torch.tensor(float(oracle.gradient_evaluations * oracle.tasks))
    return KernelResult(
        {"lower_loss": values[0].sum(), "gradient_evaluations": evaluations}, {"y": at, **state}
    )
