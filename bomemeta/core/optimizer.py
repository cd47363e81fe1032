"""SGD, momentum and Adam on one array, with the bits of torch.optim's.

Not torch's own: to make one imports its compiler, 150 MB and 1.7 s of every process that trains
(torch 2.15).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

OptimizerName = Literal["sgd", "momentum", "adam"]

# Adam's, as in torch and in the paper (Kingma & Ba, ICLR 2015).
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Optimizer:
    """Moves an array of any shape. `state` is empty before the first step; then "step" is the
    number of steps, the rest is like x.
    """

    def __init__(self, name: OptimizerName, momentum: float = 0.0) -> None:
        self._name, self._momentum = name, momentum
        self.state: dict[str, Any] = {}

    @torch.no_grad()
    def move(self, x: Tensor, gradient: Tensor, lr: float) -> None:
        """One step of size `lr`, in place."""
        if self._name == "adam":
            self._adam(x, gradient, lr)
        elif self._name == "momentum":
            x.add_(self._averaged(gradient), alpha=-lr)
        else:
            x.add_(gradient, alpha=-lr)

    def _averaged(self, gradient: Tensor) -> Tensor:
        if not self.state:
            self.state["momentum_buffer"] = gradient.clone()
            return gradient
        buffer: Tensor = self.state["momentum_buffer"]
        return buffer.mul_(self._momentum).add_(gradient)

    def _adam(self, x: Tensor, gradient: Tensor, lr: float) -> None:
        if not self.state:
            self.state = {
                "step": 0,
                "exp_avg": torch.zeros_like(x),
                "exp_avg_sq": torch.zeros_like(x),
            }
        self.state["step"] += 1
        mean, square = self.state["exp_avg"], self.state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - BETA1)
        square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        length = (square.sqrt() / (1 - BETA2 ** self.state["step"]) ** 0.5).add_(EPSILON)
        x.addcdiv_(mean, length, value=-lr / (1 - BETA1 ** self.state["step"]))

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a copy of another's state. Checkpoints of before November 2026 have that of
        torch's optimiser of the same kind.
        """
        self.state = _copied(_of_torch(state) if "param_groups" in state else state)

    def __copy__(self) -> Optimizer:
        other = Optimizer(self._name, self._momentum)
        other.load(self.state)
        return other


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }


def _of_torch(state: Mapping[str, Any]) -> dict[str, Any]:
    """With one array or several, whose states are joined."""
    parts = [state["state"][index] for index in sorted(state["state"])]
    if not parts or parts[0].get("momentum_buffer", 0) is None:
        return {}
    return {
        name: int(value)
        if name == "step"
        else torch.cat([part[name].reshape(-1) for part in parts])
        for name, value in parts[0].items()
    }
