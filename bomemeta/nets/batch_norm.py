"""The BatchNorms of conv4 and resnet12: by a task's own images, in training as in testing, or by the
running averages of an earlier training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TaskBatchNorm(nn.Module):
    """Per-channel normalisation of `[n, C, H, W]` by the statistics of the first `statistics_rows`
    images (None: of all).

    All rows is the *transductive* policy (queries see each other); the support rows alone is the
    *inductive* one.
    """

    eps = 1e-5  # torch's default

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, images: Tensor, statistics_rows: int | None = None) -> Tensor:
        if statistics_rows is None:
            return functional.batch_norm(
                images, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
        seen = images[:statistics_rows]
        # Written out because torch's own layer does not differentiate through statistics that it is
        # given.
        mean = seen.mean((0, 2, 3), keepdim=True)
        variance = (seen - mean).square().mean((0, 2, 3), keepdim=True)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (images - mean) * scale + self.bias[:, None, None]


class RunningBatchNorm(nn.BatchNorm2d):
    """torch's own, under the signature of TaskBatchNorm: in eval mode by running averages."""

    def forward(self, images: Tensor, statistics_rows: int | None = None) -> Tensor:
        return super().forward(images)
