"""AID-CG: approximate implicit differentiation with conjugate gradients, from v = 0 at every step.

Source: Grazzi, Franceschi, Pontil, Salzo, "On the Iteration Complexity of Hypergradient
Computation", ICML 2020.

Costs `aux_steps` Hessian products and one cross product per step. Nothing but y is kept with a
task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bomemeta.core import krylov
from bomemeta.core.krylov import LinearSystem
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import ImplicitSolver, Steps


@solvers.register("aid_cg")
@dataclass(frozen=True, kw_only=True)
class AidCG(ImplicitSolver):
    """Implicit hypergradient with v by conjugate gradients from 0 (Grazzi et al., ICML 2020)."""

    warm: ClassVar[bool] = False

    aux_steps: Steps = 10  # Q, steps of conjugate gradients

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.conjugate_gradients(system, self.aux_steps)
