"""torch's optimisers as functions, on one array: SGD, momentum, Adam and AdamW.

Their functions, not their classes: to make an object of one imports torch's compiler, 150 MB and
1.7 s of every process that trains (torch 2.15).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]

# Adam's, as in torch and in the paper (Kingma & Ba, ICLR 2015).
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Optimizer:
    """Moves an array of any shape. `state` is empty before the first step; then "step" is the
    number of steps, the rest is like x.

    `weight_decay` times x is added to the gradient; with adamw x is multiplied by
    1 - lr weight_decay instead (Loshchilov & Hutter, ICLR 2019).
    """

    def __init__(
        self, name: OptimizerName, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self._name, self._momentum, self._weight_decay = name, momentum, weight_decay
        self.state: dict[str, Any] = {}

    @torch.no_grad()
    def move(self, x: Tensor, gradient: Tensor, lr: float) -> None:
        """One step of size `lr`, in place."""
        if self._name in ("adam", "adamw"):
            self._adam(x, gradient, lr)
        else:
            self._sgd(x, gradient, lr)

    def _sgd(self, x: Tensor, gradient: Tensor, lr: float) -> None:
        momentum = self._momentum if self._name == "momentum" else 0.0
        buffers: list[Tensor | None] = [self.state.get("momentum_buffer")]
        sgd(
            [x],
            [gradient],
            buffers,
            foreach=False,
            weight_decay=self._weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if momentum:
            self.state["momentum_buffer"] = buffers[0]

    def _adam(self, x: Tensor, gradient: Tensor, lr: float) -> None:
        if not self.state:
            self.state = {
                "step": 0,
                "exp_avg": torch.zeros_like(x),
                "exp_avg_sq": torch.zeros_like(x),
            }
        (adamw if self._name == "adamw" else adam)(
            [x],
            [gradient],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [torch.tensor(float(self.state["step"]))],
            foreach=False,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        self.state["step"] += 1

    def load(self, state: Mapping[str, Any]) -> None:
        """Resumes from a copy of another's state. Checkpoints of before November 2026 have that of
        torch's optimiser of the same kind.
        """
        self.state = _copied(_of_torch(state) if "param_groups" in state else state)

    def __copy__(self) -> Optimizer:
        other = Optimizer(self._name, self._momentum, self._weight_decay)
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
