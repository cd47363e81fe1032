"""The direction that a solver gives x, at an x that stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.solver import LowerStates, Rounds, Solver, take_step
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import DivergenceError

# A direction has settled where so many steps in a row each changed it by no more than this share of
# its length.
SETTLED = 1e-6
STEPS_IN_A_ROW = 3


class FrozenUpper(UpperVariable):
    """x that hears directions and does not move."""

    def __init__(self, upper: Params) -> None:
        super().__init__(upper, 1, optimizer="sgd", lr=1.0, momentum=0.0, schedule="constant")
        self.heard: Tensor | None = None  # the last direction, flat; None: `move` was not called

    def move(
        self,
        direction: Params,
        step: int,
        project: Callable[[Params], Params],
        lr: float | None = None,
    ) -> dict[str, float]:
        self.heard = tree.flatten({name: direction[name].detach() for name in self.params}).clone()
        norm = float(tree.flatten(self.params).norm())
        return {"upper_update_norm": 0.0, "upper_norm": norm, "learning_rate": 0.0}


class Settled(NamedTuple):
    """The solver's direction once it has settled."""

    direction: Tensor | None  # flat; None: `failure` says why
    lower: LowerStates  # of its last step
    metrics: dict[str, float]  # of its last step
    steps: int
    change: float  # of the direction in the last step, relative; 0 where there was one step
    # where it did not settle: root mean square distance from the mean over the last quarter of the
    # steps, relative
    spread: float
    failure: str = ""


def settle(solver: Solver, upper: Params, run: Rounds, most: int) -> Settled:
    """Steps the solver at fixed x until its direction stands still, `most` times at the most; once
    where tasks are fresh.

    A direction that does not stand still is averaged over the last quarter of the steps, as x
    would. Directions of exactly 0 are a solver's warm-up and are passed over.
    """
    frozen, lower = FrozenUpper(upper), LowerStates.none()
    heard: list[Tensor] = []
    metrics: dict[str, float] = {}
    change, still, step = 0.0, 0, 0
    for step in range(1, (most if run.persistent else 1) + 1):
        frozen.heard = None
        try:
            result = take_step(solver, frozen, lower, run)
        except DivergenceError as error:
            return _failed(
                f"the solver's own numbers are not finite after {step - 1} steps at a fixed x ({error})",
                step - 1,
            )
        direction = frozen.heard
        if direction is None:
            return _failed(
                "the solver's step did not call upper.move, so there is no direction to compare",
                step,
            )
        if not direction.isfinite().all():
            return _failed(
                f"the solver's direction is not finite in step {step} at a fixed x", step
            )
        lower = LowerStates(result.lower.layout, {**lower.handles, **result.lower.handles})
        metrics = result.metrics
        if direction.any():
            if heard:
                change = float((direction - heard[-1]).norm() / direction.norm())
                still = still + 1 if change <= SETTLED else 0
            heard.append(direction)
        if still == STEPS_IN_A_ROW:
            break
    if not heard:
        return Settled(torch.zeros_like(tree.flatten(upper)), lower, metrics, step, 0.0, 0.0)
    if still == STEPS_IN_A_ROW or len(heard) == 1:
        return Settled(heard[-1], lower, metrics, step, change, 0.0)
    last = torch.stack(heard[-max(len(heard) // 4, 1) :])
    mean = last.mean(0)
    spread = float(
        (last - mean).square().sum(1).mean().sqrt()
        / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
    )
    return Settled(mean, lower, metrics, step, change, spread)


def _failed(reason: str, steps: int) -> Settled:
    return Settled(None, LowerStates.none(), {}, steps, 0.0, 0.0, reason)
