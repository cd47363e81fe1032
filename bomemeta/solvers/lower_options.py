"""The options of y's step that solvers share whose y persists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from bomemeta.core.arguments import replaced
from bomemeta.core.lower_moves import LowerOptimizer, LowerRule
from bomemeta.core.solver import Run
from bomemeta.core.upper import schedule_factor
from bomemeta.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LowerOptions:
    """How a y that persists is moved. Decay is of y's step alone and no part of g; `lower_clip_norm` is
    of its direction, over all of a task's y.
    """

    scheduled: ClassVar[str] = "inner_lr"  # the field that is y's step size

    lower_optimizer: LowerOptimizer = "sgd"
    lower_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lower_decay: Annotated[float, Field(ge=0)] = 0.0
    lower_clip_norm: Annotated[float, Field(gt=0)] | None = None

    lower_schedule: Literal["constant", "cosine"] = "constant"  # of the step of y

    def __post_init__(self) -> None:
        self.lower_rule()

    def in_step(self, run: Run) -> Self:
        """With the step size of y that its schedule gives."""
        if self.lower_schedule == "constant":
            return self
        factor = schedule_factor(self.lower_schedule, run.step, run.steps)
        return replaced(self, {self.scheduled: getattr(self, self.scheduled) * factor})

    def lower_rule(self) -> LowerRule:
        """With `lower_momentum` alone, SGD is momentum. Raises ConfigError where they do not fit."""
        name = named_rule("lower", self.lower_optimizer, self.lower_momentum)
        return LowerRule(name, self.lower_momentum, self.lower_decay, self.lower_clip_norm)


def named_rule(which: str, name: LowerOptimizer, momentum: float) -> LowerOptimizer:
    """SGD with momentum is momentum. Raises ConfigError where the two do not fit."""
    if name in ("adam", "adamw") and momentum > 0:
        raise ConfigError(
            f"solver.{which}_momentum: got {momentum:g} with {which}_optimizer: {name}, which has its own: take one out"
        )
    return "momentum" if name == "sgd" and momentum > 0 else name
