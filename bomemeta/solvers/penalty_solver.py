"""What the solvers share that take no second derivative and keep a second copy z of y, the one that
solves g alone:

    z    follows argmin g(x, .)
    y    follows argmin f(x, .) + l g(x, .)
    x <- x - upper_lr (grad_x f(x, y) + l (grad_x g(x, y) - grad_x g(x, z)))

They differ in the order of these steps and in l from step to step. What is kept of z is z - y: a
task that is met for the first time, whose groups but y are 0, then has z = y, whoever
else is in its shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bomemeta.core import tree
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle, Term, Total
from bomemeta.core.problem import must_define
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult, mean_sums
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.solvers.pacing import evaluations, groups_of
from bomemeta.solvers.upper_options import PacedOptions

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1)]

MEANS = ("upper_loss", "lower_loss", "gap", "gradient_evaluations")


@dataclass(frozen=True, kw_only=True)
class PenaltySolver(PacedOptions):
    """A solver with a penalty l (g(x, y) - g(x, z)) for the lower problem. A subclass defines
    `penalty_at` and `follow`.
    """

    inner_steps: Steps = 1
    inner_lr: Positive = 0.1  # the step of z on g
    lower_lr: Positive = 0.1  # the step of y on f + l g; below 2 / (the largest curvature of that)
    adapt_steps: Count = 10  # fresh tasks: steps of z on g, and then of y on f + l g from there

    def penalty_at(self, step: int) -> float:
        """l at a step, counted from 0."""
        raise must_define(self, "penalty_at")

    def lower_lr_at(self, penalty: float) -> float:
        """The step of y while l is `penalty`. Default: always the same."""
        return self.lower_lr

    def follow(self, oracle: Oracle, y: Params, z: Params, penalty: float) -> tuple[Params, Params]:
        """(y, z) at which x's direction is taken, for tasks whose y persists."""
        raise must_define(self, "follow")

    def leave(self, oracle: Oracle, y: Params, total: Total) -> Params:
        """The y that is kept, given f + l (g(y) - g(z)) and its gradients at `y`. Default: that y."""
        return y

    def follow_alone(
        self, oracle: Oracle, y: Params, z: Params, penalty: float
    ) -> tuple[Params, Params]:
        """(y, z) after a step in which x stands still. Default: as `follow`."""
        return self.follow(oracle, y, z, penalty)

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.adapt_steps if steps is None else steps,
            self.inner_lr,
        )

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        penalty = self.penalty_at(run.step)
        kernel = track if run.persistent else episode
        sums, lower = run(kernel, penalty=penalty)
        direction = tree.scaled(1 / run.tasks, sums["direction"])
        metrics = {
            "penalty": penalty,
            "hypergradient_norm": float(tree.dot(direction, direction).sqrt()),
        }
        metrics |= mean_sums(sums, MEANS, run.tasks)
        return StepResult(lower, metrics | upper.move(direction, run.step, run.project_upper))

    def lower_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        penalty = self.penalty_at(run.step)
        sums, lower = run(follow, penalty=penalty)
        return StepResult(lower, {"penalty": penalty} | mean_sums(sums, MEANS, run.tasks))

    def kept(self, at: Params) -> LowerGroups:
        return {"z_offset": tree.zeros_like(at)}


def episode(
    solver: PenaltySolver, oracle: Oracle, lower: LowerGroups | None, *, penalty: float
) -> KernelResult:
    """Kernel for fresh tasks: z on g, then y on f + l g from z."""
    z = solver.adapt(oracle, None)
    y = z
    for _ in range(solver.adapt_steps):
        y = penalised_step(solver, oracle, y, penalty)
    return KernelResult(_sums(oracle, penalised(oracle, y, z, penalty)), {})


def track(
    solver: PenaltySolver, oracle: Oracle, lower: LowerGroups | None, *, penalty: float
) -> KernelResult:
    """Kernel for tasks whose y persists."""
    y = lower["y"] if lower is not None else oracle.init_lower()
    z = tree.axpy(1.0, lower["z_offset"], y) if lower is not None else y
    y, z = solver.follow(oracle, y, z, penalty)
    total = penalised(oracle, y, z, penalty)
    y = solver.leave(oracle, y, total)
    return KernelResult(_sums(oracle, total), {"y": y, "z_offset": tree.axpy(-1.0, y, z)})


def follow(
    solver: PenaltySolver, oracle: Oracle, lower: LowerGroups | None, *, penalty: float
) -> KernelResult:
    """Kernel: y and z move as in `track`, x stands still."""
    groups = groups_of(solver, oracle, lower)
    y = groups["y"]
    y, z = solver.follow_alone(oracle, y, tree.axpy(1.0, groups["z_offset"], y), penalty)
    offset = tree.axpy(-1.0, y, z)
    sums = {"gradient_evaluations": evaluations(oracle)}
    return KernelResult(sums, {"y": y, "z_offset": offset})


def penalised(oracle: Oracle, y: Params, z: Params, penalty: float) -> Total:
    """f(x, y) + l (g(x, y) - g(x, z)) with its gradients in x and y."""
    return oracle.total(
        Term("upper", y), Term("lower", y, penalty), Term("lower", z, -penalty, in_y=False)
    )


def penalised_step(solver: PenaltySolver, oracle: Oracle, y: Params, penalty: float) -> Params:
    """One step of y on f + l g."""
    f, g = oracle.gradients(("upper", y), ("lower", y))
    return oracle.project_lower(
        tree.axpy(-solver.lower_lr_at(penalty), tree.axpy(penalty, g.lower, f.lower), y)
    )


def _sums(oracle: Oracle, total: Total) -> dict[str, object]:
    f, at_y, at_z = total.values
    return {
        "direction": total.upper,
        "upper_loss": f.sum(),
        "lower_loss": at_y.sum(),
        "gap": (at_y - at_z).sum(),
        "gradient_evaluations": torch.tensor(float(oracle.gradient_evaluations * oracle.tasks)),
    }
