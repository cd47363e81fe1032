"""V-PBGD: gradient descent on f plus a penalty of fixed weight on the value-function gap.

Source: Shen, Chen, "On Penalty-based Bilevel Gradient Descent Method", ICML 2023.

    z   <- z - inner_lr grad_y g(x, z),  `inner_steps` times
    (x, y) <- (x, y) - (upper_lr, lower_lr) grad [ f(x, y) + l (g(x, y) - g(x, z)) ],   z held

The solution it tends to is O(1/l) from the bilevel problem's.
"""

from __future__ import annotations

from dataclasses import dataclass

from bomemeta.core import tree
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle, Total
from bomemeta.core.tree import Params
from bomemeta.registry import solvers
from bomemeta.solvers.penalty_solver import PenaltySolver, Positive, penalised_step


@solvers.register("vpbgd")
@dataclass(frozen=True, kw_only=True)
class VPBGD(PenaltySolver):
    """Penalty-based bilevel gradient descent on the value-function gap (Shen and Chen, ICML 2023)."""

    penalty: Positive = 10.0  # l

    def penalty_at(self, step: int) -> float:
        return self.penalty

    def follow(self, oracle: Oracle, y: Params, z: Params, penalty: float) -> tuple[Params, Params]:
        return y, gradient_steps(oracle, z, self.inner_steps, self.inner_lr)

    def follow_alone(
        self, oracle: Oracle, y: Params, z: Params, penalty: float
    ) -> tuple[Params, Params]:
        _, z = self.follow(oracle, y, z, penalty)
        return penalised_step(self, oracle, y, penalty), z

    def leave(self, oracle: Oracle, y: Params, total: Total) -> Params:
        of_f, of_g, _ = total.lowers  # of the penalised g: its weight is in
        return oracle.project_lower(tree.axpy(-self.lower_lr, tree.axpy(1.0, of_g, of_f), y))
