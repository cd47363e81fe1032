"""A small convolutional network whose features of an image depend on that image alone, for data
that come one after the other.

BatchNorm cannot be had there: statistics of a stream's images would tell of images that are still
to come.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

# Of GroupNorm; one where a group would have fewer than four channels: the last map has one pixel,
# and so few values are no statistics.
GROUPS = 4
DEPTH = 4


class SampleConv(nn.Module):
    """Four blocks of 3x3 convolution, 2x2 max-pool, GroupNorm, ReLU; features `[n, width * h * w]`
    of images `[n, C, H, W]`.

    Convolutions are drawn from `generator` (He normal, fan-out). The norm comes after the pool,
    where a quarter of the values is left.
    """

    def __init__(self, channels: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [channels, *[width] * DEPTH]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes)
        )
        groups = GROUPS if width % GROUPS == 0 and width >= GROUPS**2 else 1
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(DEPTH))
        for convolution in self.convolutions:
            weight = convolution.weight
            assert isinstance(weight, torch.Tensor)
            nn.init.kaiming_normal_(
                weight, mode="fan_out", nonlinearity="relu", generator=generator
            )

    def forward(self, images: Tensor) -> Tensor:
        # Channels innermost in memory: twice as fast through these layers on a CPU. A clone, and
        # not `contiguous`, as in `Conv4`.
        hidden = (
            images.permute(0, 2, 3, 1)
            .clone(memory_format=torch.contiguous_format)
            .permute(0, 3, 1, 2)
        )
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = functional.relu(norm(functional.max_pool2d(convolution(hidden), 2)))
        return hidden.flatten(1)
