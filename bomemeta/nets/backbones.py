"""The field's two few-shot backbones: the four-layer convolutional network and ResNet-12."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from bomemeta.nets.batch_norm import RunningBatchNorm, TaskBatchNorm

Norm = type[TaskBatchNorm] | type[RunningBatchNorm]


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, BatchNorm, ReLU, 2x2 max-pool (Vinyals et al. 2016); features
    `[n, width * h * w]`.
    """

    def __init__(self, channels: int, width: int, norm: Norm = TaskBatchNorm) -> None:
        super().__init__()
        sizes = [channels, width, width, width, width]
        # no bias: BatchNorm subtracts it again
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(4))

    def forward(self, images: Tensor, statistics_rows: int | None = None) -> Tensor:
        hidden = _channels_last(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # ReLU and max-pool commute, and a quarter of the values is left after the pool
            hidden = functional.relu(
                functional.max_pool2d(norm(convolution(hidden), statistics_rows), 2)
            )
        return hidden.flatten(1)


class _Residual(nn.Module):
    """Three 3x3 convolutions beside a 1x1 shortcut, leaky ReLU, 2x2 max-pool."""

    def __init__(self, channels: int, width: int, norm: Norm = TaskBatchNorm) -> None:
        super().__init__()
        sizes = [channels, width, width, width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)
        self.shortcut_norm = norm(width)

    def forward(self, hidden: Tensor, statistics_rows: int | None) -> Tensor:
        skip = self.shortcut_norm(self.shortcut(hidden), statistics_rows)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            hidden = norm(convolution(hidden), statistics_rows)
            if i < 2:
                hidden = functional.leaky_relu(hidden, 0.1)  # slope of Lee et al. 2019 (MetaOptNet)
        return functional.leaky_relu(functional.max_pool2d(hidden + skip, 2), 0.1)


class ResNet12(nn.Module):
    """Four residual blocks of widths (1, 2.5, 5, 10) x `width`, global average pool; 64 is the
    usual width (Lee et al. 2019).
    """

    def __init__(self, channels: int, width: int, norm: Norm = TaskBatchNorm) -> None:
        super().__init__()
        sizes = [channels, width, width * 5 // 2, width * 5, width * 10]
        self.blocks = nn.ModuleList(_Residual(a, b, norm) for a, b in pairwise(sizes))

    def forward(self, images: Tensor, statistics_rows: int | None = None) -> Tensor:
        hidden = _channels_last(images)
        for block in self.blocks:
            hidden = block(hidden, statistics_rows)
        return hidden.mean((2, 3))


def _channels_last(images: Tensor) -> Tensor:
    """The same values with the channels innermost in memory, a third faster through these layers on
    a CPU.

    By permutations, because `contiguous(memory_format=channels_last)` does not work under vmap. A
    clone, because for one channel `contiguous()` finds the strides good as they are, and torch then
    takes the images for channels-first.
    """
    return (
        images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    )


BACKBONES: dict[str, Callable[[int, int, Norm], nn.Module]] = {"conv4": Conv4, "resnet12": ResNet12}


def build_backbone(
    name: str,
    channels: int,
    width: int,
    generator: torch.Generator,
    norm: Norm = TaskBatchNorm,
) -> nn.Module:
    """The named backbone, its convolutions drawn from `generator` (He normal, fan-out as for ReLU
    networks).
    """
    net = BACKBONES[name](channels, width, norm)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
    return net
