"""The options of x's step, and its start, that solvers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bomemeta.core.optimizer import OptimizerName
from bomemeta.core.solver import Solver
from bomemeta.core.tree import Params
from bomemeta.core.upper import Schedule, UpperVariable
from bomemeta.solvers.pacing import Paced

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class UpperSteps(Solver):
    """A solver that moves x by an optimiser along its direction, with step sizes of its own."""

    upper_optimizer: OptimizerName = "sgd"
    upper_schedule: Schedule = "constant"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of upper_optimizer: momentum
    # times x, added to the direction; with adamw decoupled from it
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Positive | None = None  # the longest direction that the optimiser is given
    upper_warmup_steps: Annotated[int, Field(ge=0)] = 0  # with a smaller step of x, growing
    step_every: Annotated[int, Field(ge=1)] = 1000  # upper_schedule: step; after so many steps
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1  # the step size is multiplied by this
    # x is judged and returned as a mean over its steps, each weighing so many times the next one
    upper_average: Annotated[float, Field(ge=0, lt=1)] | None = None

    def moved_by(self, lr: float, upper: Params, steps: int) -> UpperVariable:
        """x with its optimiser and step size `lr`, for a run of `steps` steps."""
        return UpperVariable(
            upper,
            steps,
            optimizer=self.upper_optimizer,
            lr=lr,
            momentum=self.momentum,
            schedule=self.upper_schedule,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            warmup_steps=self.upper_warmup_steps,
            step_every=self.step_every,
            step_factor=self.step_factor,
            average=self.upper_average,
        )


@dataclass(frozen=True, kw_only=True)
class UpperOptions(UpperSteps):
    """A solver with one step size for x."""

    upper_lr: Positive = 0.1  # the step of x

    def start(self, upper: Params, steps: int) -> UpperVariable:
        return self.moved_by(self.upper_lr, upper, steps)


@dataclass(frozen=True, kw_only=True)
class PacedOptions(Paced, UpperOptions):
    """The same with steps in which x stands still."""

    def start_upper(self, upper: Params, steps: int) -> UpperVariable:
        return self.moved_by(self.upper_lr, upper, steps)
