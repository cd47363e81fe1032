"""The upper variable with its optimiser: the one piece of state that a run carries and moves in
place.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.optimizer import Optimizer, OptimizerName
from bomemeta.core.tree import Params

Schedule = Literal["constant", "cosine", "step"]


def schedule_factor(
    schedule: Schedule,
    step: int,
    steps: int,
    *,
    warmup: int = 0,
    every: int = 1,
    factor: float = 1.0,
) -> float:
    """What a step size is multiplied by at this step, counted from 0.

    constant: 1; cosine: half a cosine from 1 to 0 over the run; step: `factor` to the power of how
    often `every` steps have passed. In the first `warmup` steps a line up to 1 instead:
    1/(warmup + 1), 2/(warmup + 1), ...; the schedule begins after them.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    step, steps = step - warmup, steps - warmup
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(factor ** (step // every))
    return 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


class UpperVariable:
    """x, moved by an optimiser along a combined direction (not a gradient of one loss).

    `clip_norm`: a longer direction is cut to this length. `average`: `averaged` is the mean of all
    x so far, each weighing `average` times what the next one does (bias-corrected, so that the
    first step's x is the first mean); None: x itself.
    """

    def __init__(
        self,
        upper: Params,
        steps: int,
        *,
        optimizer: OptimizerName,
        lr: float,
        momentum: float,
        schedule: Schedule,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        warmup_steps: int = 0,
        step_every: int = 1000,
        step_factor: float = 0.1,
        average: float | None = None,
    ) -> None:
        # The run owns its x: one array, in which the optimiser takes a few large operations and not
        # a few for every layer. These operations are elementwise, so the bits are the same.
        self._flat = tree.flatten(upper).detach()
        self._layout = tree.Layout.of(upper)
        self.params: Params = self._views(self._flat)
        self._lr, self._clip_norm = lr, clip_norm
        self._factor = functools.partial(
            schedule_factor,
            schedule,
            steps=steps,
            warmup=warmup_steps,
            every=step_every,
            factor=step_factor,
        )
        self._optimizer = Optimizer(optimizer, momentum, weight_decay)
        self._average, self._moves = average, 0
        self._mean: Tensor | None = None

    def move(
        self,
        direction: Params,
        step: int,
        project: Callable[[Params], Params],
        lr: float | None = None,
    ) -> dict[str, float]:
        """x <- project(x - lr * optimiser(direction)). Returns what to log of it.

        `lr`: this step's size before the schedule, for a solver whose step sizes are a sequence;
        None: the same at every step.
        """
        before = self._flat.clone()
        lr = (self._lr if lr is None else lr) * self._factor(step)
        flat = tree.flatten({name: direction[name] for name in self.params}).detach()
        if self._clip_norm is not None and (length := float(flat.norm())) > self._clip_norm:
            flat = flat * (self._clip_norm / length)
        self._optimizer.move(self._flat, flat, lr)
        for name, tensor in project(self.params).items():
            if tensor is not self.params[name]:
                self.params[name].copy_(tensor)
        self._take_average()
        return {
            "upper_update_norm": float((self._flat - before).norm()),
            "upper_norm": float(self._flat.norm()),
            "learning_rate": lr,
        }

    @property
    def averaged(self) -> Params:
        """What the run is judged by: the mean of x with `average`, else x."""
        return self.params if self._mean is None else self._views(self._mean)

    def _take_average(self) -> None:
        if self._average is None:
            return
        self._moves += 1
        if self._mean is None:
            self._mean = self._flat.clone()
        else:
            share = (1 - self._average) / (1 - self._average**self._moves)
            # Out of place: a copy of the run's state may hold the mean of before.
            self._mean = self._mean.lerp(self._flat, share)

    def __deepcopy__(self, memo: dict[int, Any]) -> UpperVariable:
        """A run copies x in every step: two arrays or three, and not a view of each layer."""
        other = copy.copy(self)
        other._flat = self._flat.clone()
        other.params = other._views(other._flat)
        other._optimizer = copy.copy(self._optimizer)
        return other

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and the mean of x where one is taken: tensors and numbers only."""
        if self._mean is None:
            return self._optimizer.state
        return {**self._optimizer.state, "average": self._mean, "moves": self._moves}

    def load(self, params: Params, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        for name, tensor in self.params.items():
            tensor.copy_(params[name])
        if "average" in state:
            self._mean, self._moves = state["average"].clone(), int(state["moves"])
        self._optimizer.load({k: v for k, v in state.items() if k not in ("average", "moves")})

    def _views(self, flat: Tensor) -> Params:
        parts = self._layout.parts(flat)
        return {name: part for (name, _, _), part in zip(self._layout, parts, strict=True)}
