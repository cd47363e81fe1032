"""AmIGO-CG: v by `aux_steps` steps of conjugate gradients that continue from the last outer step's v.

Source: Arbel, Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel Optimization",
ICLR 2022.

Costs Q + 1 Hessian products and one cross product per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bomemeta.core import krylov
from bomemeta.core.krylov import LinearSystem
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Steps


@solvers.register("amigo_cg")
@dataclass(frozen=True, kw_only=True)
class AmigoCG(ImplicitSolver):
    """Implicit hypergradient with v by warm conjugate gradients (Arbel and Mairal, ICLR 2022)."""

    aux_steps: Steps = 10  # Q

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.conjugate_gradients(system, self.aux_steps)
