"""SubBiO: bilevel optimisation with the linear system solved in a two-dimensional subspace, once
per outer step.

Gao, Yang, Yuan, "LancBiO: Dynamic Lanczos-Aided Bilevel Optimization via Krylov Subspace", ICLR
2025, arXiv 2404.03331.

    y  <- y - inner_lr grad_y g,  `inner_steps` times
    v  = argmin of v'Av/2 - b'v over span{ b, (I - aux_lr A) v },   A = d2g/dy2,   b = grad_y f,   at the present (x, y)
    x  <- x - upper_lr (grad_x f - (d2g/dxdy) v)

The gradient step on the quadratic, v - aux_lr (A v - b), lies in that plane, so this is never
worse. Three Hessian products and one cross product per step; nothing but v is kept with a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from bomemeta.core import krylov
from bomemeta.core.krylov import LinearSystem
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Positive, Steps


@solvers.register("subbio")
@dataclass(frozen=True, kw_only=True)
class SubBiO(ImplicitSolver):
    """Implicit hypergradient from a two-dimensional subspace (Gao et al., ICLR 2025).

    Tasks whose y persists take one such step in v per outer step. Fresh tasks adapt y on g and take
    `aux_steps` of them from v = 0.
    """

    aux_lr: Positive = (
        0.1  # eta of the plane; below 2 / (the largest curvature of g) v never gets worse
    )
    aux_steps: Steps = 5  # fresh tasks: steps in v
    ritz_floor: Annotated[float, Field(ge=0, lt=1)] = (
        1e-6  # Ritz values up to this share of the largest are left out
    )

    def solve(self, system: LinearSystem) -> Tensor:
        v = krylov.two_dimensional(system, self.aux_lr, self.ritz_floor)
        if system.start is None:
            for _ in range(self.aux_steps - 1):
                v = krylov.two_dimensional(system.restarted(v), self.aux_lr, self.ritz_floor)
        return v
