"""ResNet-18 (He et al. 2016) with the statistics of the batch and of any width: a network whose
buffers move is no function of (x, y, data), and torchvision's cannot be made small for a test.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional


class _Basic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = (
            nn.BatchNorm2d(width, track_running_stats=False) for _ in range(2)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False),
                nn.BatchNorm2d(width, track_running_stats=False),
            )

    def forward(self, hidden: Tensor) -> Tensor:
        inside = functional.relu(self.norm1(self.conv1(hidden)))
        return functional.relu(self.norm2(self.conv2(inside)) + self.shortcut(hidden))


class ResNet18(nn.Module):
    """For images of 32 to 64 pixels: a 3x3 stem without a pool."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width, track_running_stats=False)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Basic(a, b, 1 if i == 0 else 2), _Basic(b, b, 1))
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stages(functional.relu(self.norm(self.stem(images))))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits
