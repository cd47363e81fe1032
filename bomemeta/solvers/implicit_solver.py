"""What the solvers share that keep y near argmin g, solve A v = b for v, and move x along grad_x f
- (d2g/dxdy) v.

    y <- y - inner_lr grad_y g,  `inner_steps` times
    v <- solve(A, b),  A = d2g/dy2,  b = grad_y f,  at the present (x, y)
    x <- x - upper_lr (grad_x f - (d2g/dxdy) v)

They differ in `solve` alone: one file each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.implicit import hypergradient, linear_system, move_upper
from bomemeta.core.inner import gradient_steps
from bomemeta.core.krylov import LinearSystem
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import must_define
from bomemeta.core.solver import (
    Kernel,
    KernelResult,
    LowerGroups,
    LowerStates,
    Reduced,
    Run,
    StepResult,
)
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.solvers.lower_options import LowerOptions
from bomemeta.solvers.pacing import followed
from bomemeta.solvers.upper_options import PacedOptions

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class ImplicitSolver(LowerOptions, PacedOptions):
    """A solver with an implicit hypergradient. A subclass defines `solve`, and `warm`: whether v
    continues from the last step's.
    """

    warm: ClassVar[bool] = True

    inner_steps: Steps = 5  # of y on g in a step of the run; fresh tasks: all the steps that y gets
    inner_lr: Positive = 0.1  # their size
    # how often |A v - b| is measured (0: never): free, but for |y| numbers sent where y is shared
    residual_every: Count = 1

    def solve(self, system: LinearSystem) -> Tensor:
        """v [B, n] from where the system starts."""
        raise must_define(self, "solve")

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.inner_steps if steps is None else steps,
            self.inner_lr,
        )

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = self.asked(run)
        return StepResult(lower, move_upper(upper, sums, run))

    def asked(self, run: Run) -> Reduced:
        """The step's one kernel, on all tasks."""
        kernel = self.tracking() if run.persistent else episode
        every = self.residual_every
        residual = every > 0 and (run.step % every == 0 or run.step == run.steps - 1)
        return run(kernel, residual=residual)

    def kept(self, at: Params) -> LowerGroups:
        return {"v": tree.zeros_like(at)} if self.warm else {}

    def tracking(self) -> Kernel:
        """The kernel for tasks whose y persists."""
        return track


def episode(
    solver: ImplicitSolver, oracle: Oracle, lower: LowerGroups | None, *, residual: bool
) -> KernelResult:
    """Kernel for fresh tasks: adapt y on g, solve for v from 0 at that y."""
    at = solver.adapt(oracle, None)
    return KernelResult(
        hypergradient(oracle, at, solver.solve(linear_system(oracle, at, None)), residual=residual),
        {},
    )


def track(
    solver: ImplicitSolver, oracle: Oracle, lower: LowerGroups | None, *, residual: bool
) -> KernelResult:
    """Kernel for tasks whose y persists: y follows x, then v."""
    at, state = followed(solver, oracle, lower)
    if not solver.warm:
        v = solver.solve(linear_system(oracle, at, None))
        return KernelResult(hypergradient(oracle, at, v, residual=residual), {"y": at, **state})
    before = (
        tree.flatten_tasks(lower["v"])
        if lower is not None
        else torch.zeros_like(tree.flatten_tasks(at))
    )
    v = solver.solve(linear_system(oracle, at, before))
    return KernelResult(
        hypergradient(oracle, at, v, residual=residual),
        {"y": at, "v": tree.unflatten_tasks(v, at), **state},
    )
