"""Small networks for images or rows, without statistics of a batch: a sample's output is a function of
that sample and the weights.
"""

from __future__ import annotations

from torch import Tensor, nn


class SmallConv(nn.Module):
    """Three 3x3 convolutions of stride 2 with GroupNorm and ReLU, widths 1, 2 and 4 times `width`, the
    average over positions, and a linear layer: logits `[n, classes]`.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(1, outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


def mlp(inputs: int, classes: int, width: int) -> nn.Module:
    """One hidden layer of `width` ReLU units, on flattened inputs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes)
    )
