"""A solver of one's own: BOME without its barrier, lambda held constant. The control that a dynamic
barrier has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bomemeta.core import tree
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle, Term
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
from bomemeta.registry import solvers

Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]


@solvers.register("fixed_penalty")
@dataclass(frozen=True, kw_only=True)
class FixedPenalty(Solver):
    """Minimises f + penalty (g(x, y) - g(x, z)), z = argmin g, in x and y. Its solution is off by
    the order of 1 / penalty.
    """

    penalty: Positive = 20.0
    inner_steps: Steps = 20  # of both chains: y on f + penalty g, and z on g alone
    inner_lr: Positive = 0.1
    upper_lr: Positive = 0.1

    def start(self, upper: Params, steps: int) -> UpperVariable:
        return UpperVariable(
            upper, steps, optimizer="sgd", lr=self.upper_lr, momentum=0.0, schedule="constant"
        )

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        # One round: `penalised` runs on every shard of the step's tasks, on whatever worker; the
        # sums come back added.
        sums, lower = run(penalised)
        metrics = mean_sums(sums, ("upper_loss", "lower_loss", "gap"), run.tasks)
        # The last act: whatever fails before it leaves x as it was, and the step is as if it had
        # not begun.
        metrics |= upper.move(
            tree.scaled(1 / run.tasks, sums["direction"]), run.step, run.project_upper
        )
        return StepResult(lower, metrics)

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.inner_steps if steps is None else steps,
            self.inner_lr,
        )


def penalised(solver: FixedPenalty, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel, on a stack of B tasks. At module level, because workers find it by its name; pure, so
    that any may run it again.
    """
    at = lower["y"] if lower is not None else solver.adapt(oracle, None)
    solved = gradient_steps(oracle, at, solver.inner_steps, solver.inner_lr)
    for _ in range(solver.inner_steps):
        direction = tree.axpy(solver.penalty, oracle.lower(at).lower, oracle.upper(at).lower)
        at = oracle.project_lower(tree.axpy(-solver.inner_lr / (1 + solver.penalty), direction, at))
    # The gradient in x of the whole sum, with one pull-back through the problem's `encode`.
    total = oracle.total(
        Term("upper", at), Term("lower", at, solver.penalty), Term("lower", solved, -solver.penalty)
    )
    upper_loss, lower_loss, solved_loss = (torch.sum(value) for value in total.values)
    sums = {
        "upper_loss": upper_loss,
        "lower_loss": lower_loss,
        "gap": lower_loss - solved_loss,
        "direction": total.upper,
    }
    return KernelResult(sums, {"y": at})
