"""The options of y's step that solvers share whose y persists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bomemeta.core.lower_moves import LowerOptimizer, LowerRule
from bomemeta.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LowerOptions:
    """How a y that persists is moved. Decay is of y's step alone and no part of g; `lower_clip_norm` is
    of its direction, over all of a task's y.
    """

    lower_optimizer: LowerOptimizer = "sgd"
    lower_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lower_decay: Annotated[float, Field(ge=0)] = 0.0
    lower_clip_norm: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        self.lower_rule()

    def lower_rule(self) -> LowerRule:
        """With `lower_momentum` alone, SGD is momentum. Raises ConfigError where they do not fit."""
        name = self.lower_optimizer
        if name == "sgd" and self.lower_momentum > 0:
            name = "momentum"
        if name in ("adam", "adamw") and self.lower_momentum > 0:
            raise ConfigError(
                f"solver.lower_momentum: got {self.lower_momentum:g} with lower_optimizer: {name}, which has its own: take one out"
            )
        return LowerRule(name, self.lower_momentum, self.lower_decay, self.lower_clip_norm)
