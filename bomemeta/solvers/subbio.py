"""SubBiO: bilevel optimisation with the linear system solved in a two-dimensional subspace, once per outer step.

Gao, Yang, Yuan, "LancBiO: Dynamic Lanczos-Aided Bilevel Optimization via Krylov Subspace", ICLR 2025, arXiv 2404.03331.

    y  <- y - inner_lr grad_y g,  `inner_steps` times
    v  = argmin of v'Av/2 - b'v over span{ b, (I - aux_lr A) v },   A = d2g/dy2,   b = grad_y f,   at the present (x, y)
    x  <- x - upper_lr (grad_x f - (d2g/dxdy) v)

The gradient step on the quadratic, v - aux_lr (A v - b), lies in that plane, so this is never worse. Three Hessian products and one
cross product per step; nothing but v is kept with a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from bomemeta.core import krylov, tree
from bomemeta.core.implicit import flat_hessian, hypergradient, move_upper
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import LocalOracle
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.upper_options import UpperOptions

Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]


@solvers.register("subbio")
@dataclass(frozen=True, kw_only=True)
class SubBiO(UpperOptions):
    """Implicit hypergradient from a two-dimensional subspace (Gao et al., ICLR 2025).

    Tasks whose y persists take one such step in v per outer step. Fresh tasks adapt y on g and take `aux_steps` of them from v = 0.
    """

    inner_steps: Steps = 5  # of y on g; fresh tasks: all the steps that y gets
    inner_lr: Positive = 0.1  # theta, their size
    aux_lr: Positive = 0.1  # eta of the plane; below 2 / (the largest curvature of g) v never gets worse
    aux_steps: Steps = 5  # fresh tasks: steps in v
    ritz_floor: Annotated[float, Field(ge=0, lt=1)] = 1e-6  # Ritz values up to this share of the largest are left out

    def adapt(self, oracle: LocalOracle, steps: int | None) -> Params:
        return gradient_steps(oracle, oracle.init_lower(), self.inner_steps if steps is None else steps, self.inner_lr)

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(track if run.persistent else episode, self, upper.params, lower, keeps=run.persistent)
        return StepResult(lower, move_upper(upper, sums, run))


def episode(solver: SubBiO, oracle: LocalOracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel for fresh tasks: adapt y on g, solve for v from 0 at that y."""
    at = solver.adapt(oracle, None)
    return _measured(solver, oracle, at, tree.zeros_like(at), solver.aux_steps)


def track(solver: SubBiO, oracle: LocalOracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel for tasks whose y persists: y follows x, then one step of v."""
    at = gradient_steps(oracle, lower["y"] if lower is not None else oracle.init_lower(), solver.inner_steps, solver.inner_lr)
    return _measured(solver, oracle, at, lower["v"] if lower is not None else tree.zeros_like(at), 1)


def _measured(solver: SubBiO, oracle: LocalOracle, at: Params, start: Params, steps: int) -> KernelResult:
    right = tree.flatten_tasks(oracle.upper(at).lower)
    product = flat_hessian(oracle, at)
    v: Tensor = tree.flatten_tasks(start)
    for _ in range(steps):
        v = krylov.two_dimensional(product, right, v, solver.aux_lr, solver.ritz_floor)
    return KernelResult(hypergradient(oracle, at, v), {"y": at, "v": tree.unflatten_tasks(v, at)})
