"""AmIGO-GD: v by `aux_steps` gradient steps that continue from the last outer step's v.

Source: Arbel, Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel Optimization",
ICLR 2022.

    v <- v - aux_lr (A v - b),  Q times

Costs Q Hessian products and one cross product per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bomemeta.core import krylov
from bomemeta.core.krylov import LinearSystem
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Positive, Steps


@solvers.register("amigo_gd")
@dataclass(frozen=True, kw_only=True)
class AmigoGD(ImplicitSolver):
    """Implicit hypergradient with v by warm gradient steps (Arbel and Mairal, ICLR 2022)."""

    aux_steps: Steps = 10  # Q
    aux_lr: Positive = 0.1  # below 2 / (the largest curvature of g)

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.gradient_descent(system, self.aux_steps, self.aux_lr)
