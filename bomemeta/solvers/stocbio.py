"""stocBiO: the Neumann series v = aux_lr sum_{i <= Q} (I - aux_lr A)^i b, from 0 at every step.

Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design", ICML
2021.

With the step's tasks or blocks taken whole, as here, each factor has the same A: the sum is then
AID-Neumann's with Q + 1 terms. (The paper draws a new batch for each factor.) Costs Q Hessian
products and one cross product per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bomemeta.core import krylov
from bomemeta.core.krylov import LinearSystem
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Positive, Steps


@solvers.register("stocbio")
@dataclass(frozen=True, kw_only=True)
class StocBiO(ImplicitSolver):
    """Implicit hypergradient with v by the Neumann series of stocBiO (Ji et al., ICML 2021)."""

    warm: ClassVar[bool] = False

    aux_steps: Steps = 10  # Q
    aux_lr: Positive = 0.1  # eta, below 2 / (the largest curvature of g)

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.gradient_descent(system, self.aux_steps + 1, self.aux_lr)
