"""SOBA: y, v and x take one step each, all from the same old point.

Source: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
stochastic and global variance reduction algorithms", NeurIPS 2022.

    y <- y - inner_lr grad_y g
    v <- v - aux_lr (A v - b),   A = d2g/dy2,   b = grad_y f
    x <- x - upper_lr (grad_x f - (d2g/dxdy) v)

One question of the oracle, and one reduce of 2|y| + |x| numbers where y is shared. It is sl-BAMM's
Jacobi step with mu = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bomemeta.core import krylov, tree
from bomemeta.core.implicit import MEANS, adjoint_sums
from bomemeta.core.krylov import LinearSystem
from bomemeta.core.oracle import G, Oracle
from bomemeta.core.solver import (
    Kernel,
    KernelResult,
    LowerGroups,
    LowerStates,
    Run,
    StepResult,
    mean_sums,
)
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Positive, Steps


@solvers.register("soba")
@dataclass(frozen=True, kw_only=True)
class SOBA(ImplicitSolver):
    """Single-loop implicit hypergradient, all three steps from the old point (Dagreou et al.,
    NeurIPS 2022).

    Tasks whose y persists take one step on g, whatever `inner_steps` says. Fresh tasks have no old
    point: y is adapted by `inner_steps` steps, v by `aux_steps` gradient steps from 0.
    """

    aux_lr: Positive = 0.1  # below 2 / (the largest curvature of g)
    aux_steps: Steps = 10  # fresh tasks: steps of v

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.gradient_descent(system, self.aux_steps, self.aux_lr)

    def tracking(self) -> Kernel:
        return track

    def lower_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        """The same question as in a joint step: y and v move."""
        sums, lower = self.asked(run)
        return StepResult(lower, mean_sums(sums, MEANS, run.tasks))


def track(
    solver: SOBA, oracle: Oracle, lower: LowerGroups | None, *, residual: bool
) -> KernelResult:
    """Kernel for tasks whose y persists: the three directions at the old (y, v)."""
    y = lower["y"] if lower is not None else oracle.init_lower()
    v = lower["v"] if lower is not None else tree.zeros_like(y)
    at = oracle.adjoint(y, v, *G)
    rule = solver.lower_rule()
    moved, state = rule.move(y, at.lower, solver.inner_lr, rule.state(lower, y))
    sums = adjoint_sums(oracle, at, v, oracle.hessian_products)
    v = tree.axpy(-solver.aux_lr, at.residual, v)
    return KernelResult(sums, {"y": oracle.project_lower(moved), "v": v, **state})
