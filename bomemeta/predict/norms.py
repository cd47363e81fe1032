"""A backbone whose BatchNorms are fixed at a task's own statistics: an image's features then depend
on that image alone, with the bits of the inductive policy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bomemeta.nets.batch_norm import TaskBatchNorm
from bomemeta.nets.task_norms import TaskNorm


class Moments(NamedTuple):
    """Of one layer's input over a task's support images, per channel: `[1, C, 1, 1]` or `[1, C]`."""

    mean: Tensor
    variance: Tensor


class FixedNorm(nn.Module):
    """(images - mean) / sqrt(variance + eps) * weight + bias, in the order of the layer replaced."""

    def __init__(self, layer: TaskBatchNorm | TaskNorm, moments: Moments) -> None:
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.eps = layer.eps
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mean", moments.mean)
        self.register_buffer("variance", moments.variance)
        self._scales_first = isinstance(layer, TaskBatchNorm)

    def forward(self, images: Tensor, statistics_rows: int | None = None) -> Tensor:
        """`statistics_rows` is what conv4 and resnet12 hand on; the moments are known here."""
        root = (self.variance + self.eps).rsqrt()
        shape = (-1, *[1] * (images.dim() - 2))
        if self.weight is None:
            normed: Tensor = (images - self.mean) * root
            return normed
        weight, bias = self.weight.reshape(shape), self.bias.reshape(shape)
        if self._scales_first:
            scaled: Tensor = (images - self.mean) * (weight * root[0]) + bias
            return scaled
        shifted: Tensor = (images - self.mean) * root * weight + bias
        return shifted


def fixed_at(module: nn.Module, moments: Mapping[str, Moments]) -> nn.Module:
    """A copy of the module with a FixedNorm in the place of every layer that `moments` names."""
    fixed = copy.deepcopy(module)
    for name, found in moments.items():
        layer = fixed.get_submodule(name)
        assert isinstance(layer, TaskBatchNorm | TaskNorm), "moments name these layers"
        parent, _, own = name.rpartition(".")
        setattr(fixed.get_submodule(parent), own, FixedNorm(layer, found))
    return fixed.eval().requires_grad_(False)


def moments_of(module: nn.Module, images: Tensor) -> dict[str, Moments]:
    """The moments that every task norm of the module sees, with these images as the support set."""
    found: dict[str, Moments] = {}
    hooks = []

    def record(name: str) -> object:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0]
            over = (0, *range(2, seen.dim()))
            mean = seen.mean(over, keepdim=True)
            found[name] = Moments(mean, (seen - mean).square().mean(over, keepdim=True))

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, TaskBatchNorm | TaskNorm):
            hooks.append(layer.register_forward_hook(record(name)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
