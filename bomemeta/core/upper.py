"""The upper variable with its optimiser: the one piece of state that a run carries and moves in
place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from bomemeta.core import tree
from bomemeta.core.optimizer import Optimizer, OptimizerName
from bomemeta.core.tree import Params

Schedule = Literal["constant", "cosine"]


def schedule_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What a step size is multiplied by at this step: 1, or half a cosine from 1 to 0 over the run."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


class UpperVariable:
    """x, moved by an optimiser along a combined direction (not a gradient of one loss)."""

    def __init__(
        self,
        upper: Params,
        steps: int,
        *,
        optimizer: OptimizerName,
        lr: float,
        momentum: float,
        schedule: Schedule,
    ) -> None:
        # The run owns its x: one array, in which the optimiser takes a few large operations and not
        # a few for every layer. These operations are elementwise, so the bits are the same.
        self._flat = tree.flatten(upper).detach()
        self._shapes = {name: tensor.shape for name, tensor in upper.items()}
        self.params: Params = self._views()
        self._steps, self._lr, self._schedule = steps, lr, schedule
        self._optimizer = Optimizer(optimizer, momentum)

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
        lr = (self._lr if lr is None else lr) * schedule_factor(self._schedule, step, self._steps)
        self._optimizer.move(
            self._flat, tree.flatten({name: direction[name] for name in self.params}), lr
        )
        for name, tensor in project(self.params).items():
            if tensor is not self.params[name]:
                self.params[name].copy_(tensor)
        return {
            "upper_update_norm": float((self._flat - before).norm()),
            "upper_norm": float(self._flat.norm()),
            "learning_rate": lr,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> UpperVariable:
        """A run copies x in every step: two arrays or three, and not a view of each layer."""
        other = copy.copy(self)
        other._flat = self._flat.clone()
        other.params = other._views()
        other._optimizer = copy.copy(self._optimizer)
        return other

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state: tensors and numbers only."""
        return self._optimizer.state

    def load(self, params: Params, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        for name, tensor in self.params.items():
            tensor.copy_(params[name])
        self._optimizer.load(state)

    def _views(self) -> Params:
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = torch.split(self._flat, sizes)
        return {
            name: part.view(shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }
