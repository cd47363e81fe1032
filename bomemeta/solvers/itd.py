"""ITD: iterative differentiation, the gradient of f(x, y_T(x)) through T gradient steps on g
(reverse mode).

Source: Franceschi, Donini, Frasconi, Pontil, "Forward and Reverse Gradient-Based Hyperparameter
Optimization", ICML 2017.

    y_{t+1} = y_t - inner_lr grad_y g(x, y_t),  t = 0..T-1
    x <- x - upper_lr d f(x, y_T(x)) / dx

For tasks of one process it is one backward pass through the graph of all steps, whose memory grows
with T. Where y is shared the trajectory is kept and each step's products are a reduce of |x| + |y|
numbers on the way back. What a start takes from x is not followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bomemeta.core.implicit import move_upper
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import Oracle
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.solvers.upper_options import PacedOptions


@solvers.register("itd")
@dataclass(frozen=True, kw_only=True)
class ITD(PacedOptions):
    """Unrolled differentiation of the inner loop (Franceschi et al., ICML 2017)."""

    inner_steps: Annotated[int, Field(ge=1)] = 10  # T
    inner_lr: Annotated[float, Field(gt=0)] = 0.1
    # a y that persists continues from the last step's end; off: from its start at every step
    warm_start: bool = True

    def __post_init__(self) -> None:
        if not self.warm_start and self.paced:
            raise ConfigError(
                f"solver.warm_start: got false with warm_start_steps: {self.warm_start_steps} and upper_every: {self.upper_every}; y would "
                "start anew in every step, and steps without x would be lost: set it to true, or take these two out"
            )

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.inner_steps if steps is None else steps,
            self.inner_lr,
        )

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(unroll)
        return StepResult(lower, move_upper(upper, sums, run))


def unroll(solver: ITD, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: T steps from where y is, and the gradient through them."""
    start = lower["y"] if lower is not None and solver.warm_start else oracle.init_lower()
    found = oracle.unrolled(start, solver.inner_steps, solver.inner_lr)
    sums = {
        "direction": found.upper,
        "upper_loss": found.upper_value.sum(),
        "lower_loss": found.lower_value.sum(),
        "gradient_evaluations": torch.tensor(float(oracle.gradient_evaluations * oracle.tasks)),
        "hessian_products": torch.tensor(float(oracle.hessian_products * oracle.tasks)),
    }
    return KernelResult(sums, {"y": found.at})
