"""A large network's passes over a stack of tasks, a few images at a time: no more than their
activations are held at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Params = dict[str, Tensor]


class MicroBatches:
    """Features `[B, n, d]` of images `[B, n, C, H, W]` under a network whose features of an image
    depend on that image alone. The backward pass goes forward again, part by part.
    """

    features: Tensor

    def __init__(
        self,
        network: Callable[[Params, Tensor], Tensor],
        x: Params,
        images: Tensor,
        images_per_pass: int,
    ) -> None:
        self._network = network
        self._x = {name: tensor.detach() for name, tensor in x.items()}
        self._parts = torch.split(images.flatten(0, 1), images_per_pass)
        with torch.no_grad():
            features = torch.cat([network(self._x, part) for part in self._parts])
        self.features = features.reshape(*images.shape[:2], -1)

    def pull_back(self, cotangent: Tensor) -> Params:
        """The gradient in x of <features, cotangent>, summed over all images."""
        total = {name: torch.zeros_like(tensor) for name, tensor in self._x.items()}
        if not total:
            return total
        sizes = [len(part) for part in self._parts]
        for part, along in zip(
            self._parts, torch.split(cotangent.flatten(0, 1), sizes), strict=True
        ):
            with torch.enable_grad():
                leaves = {name: tensor.requires_grad_() for name, tensor in self._x.items()}
                features = self._network(leaves, part)
                grads = torch.autograd.grad(
                    features, list(leaves.values()), along, materialize_grads=True
                )
            for name, grad in zip(total, grads, strict=True):
                total[name] += grad
        return total
