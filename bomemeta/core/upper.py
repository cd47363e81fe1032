"""The upper variable with its optimiser: the one piece of state that a run carries and moves in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from bomemeta.core import tree
from bomemeta.core.tree import Params

OptimizerName = Literal["sgd", "momentum", "adam"]
Schedule = Literal["constant", "cosine"]


def schedule_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What a step size is multiplied by at this step: 1, or half a cosine from 1 to 0 over the run."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


class UpperVariable:
    """x, moved by a torch optimiser along a combined direction (not a gradient of one loss)."""

    def __init__(
        self, upper: Params, steps: int, *, optimizer: OptimizerName, lr: float, momentum: float, schedule: Schedule
    ) -> None:
        # Contiguous copies: the run owns its x, and its bytes are what `upper_sha256` is taken over.
        self.params: Params = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in upper.items()}
        self._steps, self._lr, self._schedule = steps, lr, schedule
        tensors = list(self.params.values())
        # foreach=False: one code path whatever the number of tensors, so that bits do not depend on it
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(tensors, lr=lr, foreach=False)
            if optimizer == "adam"
            else torch.optim.SGD(tensors, lr=lr, momentum=momentum if optimizer == "momentum" else 0.0, foreach=False)
        )

    def move(self, direction: Params, step: int, project: Callable[[Params], Params], lr: float | None = None) -> dict[str, float]:
        """x <- project(x - lr * optimiser(direction)). Returns what to log of it.

        `lr`: this step's size before the schedule, for a solver whose step sizes are a sequence; None: the same at every step.
        """
        before = tree.flatten(self.params)
        lr = (self._lr if lr is None else lr) * schedule_factor(self._schedule, step, self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, tensor in self.params.items():
            tensor.grad = direction[name]
        self._optimizer.step()
        for name, tensor in project(self.params).items():
            if tensor is not self.params[name]:
                self.params[name].copy_(tensor)
        self._optimizer.zero_grad(set_to_none=True)
        after = tree.flatten(self.params)
        return {
            "upper_update_norm": float((after - before).norm()),
            "upper_norm": float(after.norm()),
            "learning_rate": lr,
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state: tensors, numbers, lists and dictionaries only."""
        return self._optimizer.state_dict()

    def load(self, params: Params, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        for name, tensor in self.params.items():
            tensor.copy_(params[name])
        self._optimizer.load_state_dict(state)
