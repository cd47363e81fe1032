"""CTN's update as its authors released it: first order, y on g and then x along grad_x f at the new
y.

Source: Pham, Liu, Sahoo, Hoi, "Contextual Transformation Networks for Online Continual Learning",
ICLR 2021.

    y <- y - inner_lr grad_y g(x, y),  `inner_steps` times
    x <- x - upper_lr grad_x f(x, y)

The paper differentiates f through the steps of y (solver `itd`); the released code cuts that graph
by copying y in place, so the term with d2g/dxdy is never there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bomemeta.core.implicit import move_upper
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle, Term
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.lower_options import LowerOptions
from bomemeta.solvers.upper_options import PacedOptions


@solvers.register("ctn")
@dataclass(frozen=True, kw_only=True)
class CTN(LowerOptions, PacedOptions):
    """Alternating first-order steps (Pham et al., ICLR 2021, as released). Blind to what x does to
    y.
    """

    inner_steps: Annotated[int, Field(ge=1)] = 2
    inner_lr: Annotated[float, Field(gt=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0  # of grad_x f, as in the released code

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.inner_steps if steps is None else steps,
            self.inner_lr,
        )

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(alternate)
        return StepResult(lower, move_upper(upper, sums, run))


def alternate(solver: CTN, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: the steps of y, and grad_x f at their end. `lower_loss` is g at the last point but
    that.
    """
    at = lower["y"] if lower is not None else oracle.init_lower()
    value = torch.zeros(oracle.tasks)
    rule = solver.lower_rule()
    state = rule.state(lower, at)
    for _ in range(solver.inner_steps):
        g = oracle.lower(at)
        value = g.value
        moved, state = rule.move(at, g.lower, solver.inner_lr, state)
        at = oracle.project_lower(moved)
    f = oracle.total(Term("upper", at, in_y=False))
    sums = {
        "direction": f.upper,
        "upper_loss": f.values[0].sum(),
        "lower_loss": value.sum(),
        "gradient_evaluations": torch.tensor(float(oracle.gradient_evaluations * oracle.tasks)),
    }
    return KernelResult(sums, {"y": at, **state})
