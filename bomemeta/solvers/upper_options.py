"""The options of x's step, and its start, that solvers with one step size for x share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bomemeta.core.optimizer import OptimizerName
from bomemeta.core.solver import Solver
from bomemeta.core.tree import Params
from bomemeta.core.upper import Schedule, UpperVariable

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class UpperOptions(Solver):
    """A solver that moves x by an optimiser along its direction."""

    upper_lr: Positive = 0.1  # the step of x
    upper_optimizer: OptimizerName = "sgd"
    upper_schedule: Schedule = "constant"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of upper_optimizer: momentum

    def start(self, upper: Params, steps: int) -> UpperVariable:
        return UpperVariable(
            upper,
            steps,
            optimizer=self.upper_optimizer,
            lr=self.upper_lr,
            momentum=self.momentum,
            schedule=self.upper_schedule,
        )
