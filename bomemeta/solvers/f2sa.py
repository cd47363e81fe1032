"""F2SA: a first-order method with a penalty that grows from step to step.

Source: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization",
ICML 2023.

    `inner_steps` times:  z <- z - inner_lr grad_y g(x, z),   y <- y - a_k (grad_y f(x, y) + l_k grad_y g(x, y))
    x   <- x - upper_lr (grad_x f(x, y) + l_k (grad_x g(x, y) - grad_x g(x, z)))
    l_k  = penalty + k penalty_growth,   a_k = lower_lr penalty / l_k

The direction is the hypergradient up to O(1/l). a_k has to stay below 2 / (the largest curvature of
f + l_k g): it shrinks as l grows, as in the paper, where a_k l_k is a step of its own; one that is
stable at step 0 stays so. x's direction has l_k (y - z) in it, so that what y and z lag behind is
multiplied by l_k: with lower_lr penalty = inner_lr they lag alike, and it cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bomemeta.core import tree
from bomemeta.core.oracle import Oracle
from bomemeta.core.tree import Params
from bomemeta.registry import solvers
from bomemeta.solvers.penalty_solver import PenaltySolver, Positive


@solvers.register("f2sa")
@dataclass(frozen=True, kw_only=True)
class F2SA(PenaltySolver):
    """Fully first-order bilevel optimisation with a growing penalty (Kwon et al., ICML 2023)."""

    penalty: Positive = 1.0  # l at step 0
    penalty_growth: Annotated[float, Field(ge=0)] = 0.01  # delta, added at every step

    def penalty_at(self, step: int) -> float:
        return self.penalty + step * self.penalty_growth

    def lower_lr_at(self, penalty: float) -> float:
        return self.lower_lr * self.penalty / penalty

    def follow(self, oracle: Oracle, y: Params, z: Params, penalty: float) -> tuple[Params, Params]:
        lr = self.lower_lr_at(penalty)
        for number in range(self.inner_steps):
            with oracle.inner_batch(number):  # one reduce for both
                f, at_y, at_z = oracle.gradients(("upper", y), ("lower", y), ("lower", z))
            z = oracle.project_lower(tree.axpy(-self.inner_lr, at_z.lower, z))
            y = oracle.project_lower(tree.axpy(-lr, tree.axpy(penalty, at_y.lower, f.lower), y))
        return y, z
