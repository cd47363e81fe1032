"""AID-Neumann: the inverse Hessian as a truncated Neumann series, v = aux_lr sum_{i < K} (I -
aux_lr A)^i b.

Source: Grazzi, Franceschi, Pontil, Salzo, "On the Iteration Complexity of Hypergradient
Computation", ICML 2020.

Costs K - 1 Hessian products and one cross product per step; `aux_lr` has to be below 2 / (the
largest curvature of g).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bomemeta.core import krylov
from bomemeta.core.krylov import LinearSystem
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Positive, Steps


@solvers.register("aid_neumann")
@dataclass(frozen=True, kw_only=True)
class AidNeumann(ImplicitSolver):
    """Implicit hypergradient with v by a truncated Neumann series (Grazzi et al., ICML 2020)."""

    warm: ClassVar[bool] = False

    aux_steps: Steps = 10  # K, terms of the series
    aux_lr: Positive = 0.1

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.gradient_descent(system, self.aux_steps, self.aux_lr)
