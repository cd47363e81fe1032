"""The floor of a few-shot step: one forward and one backward pass of the backbone over the same
images, in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bomemeta.core.problem import Batch, Split
from bomemeta.nets import build_backbone
from bomemeta.problems.few_shot import FewShot

IMAGES_LABELS = ("support", "query", "support_labels", "query_labels")


class Preloaded(FewShot):
    """Hands out the episodes in `batch` whatever it is asked for, so that a step's time has no data
    loading in it.
    """

    batch: Batch

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        first = task_ids[0] % len(self.batch["support"])
        return {name: tensor[first : first + len(task_ids)] for name, tensor in self.batch.items()}

    def draw(self, number: int, tasks: int) -> None:
        """The episodes of step `number`."""
        self.batch = super().load(range(number * tasks, (number + 1) * tasks), 0, "train")


def plain_network(problem: FewShot) -> nn.Sequential:
    """The four-layer network as its users write it, `Sequential(features, linear)`: images as they
    come (NCHW), biases.
    """
    sizes = [problem.data.image_shape[0], *[problem.width] * 4]
    blocks: list[nn.Module] = []
    for i in range(4):
        blocks += [
            nn.Conv2d(*sizes[i : i + 2], 3, padding=1),
            nn.BatchNorm2d(problem.width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return _with_head(nn.Sequential(*blocks, nn.Flatten()), problem)


def channels_last_network(problem: FewShot) -> nn.Sequential:
    """The same with bomemeta's backbone, whose layers have the channels innermost in memory and no
    biases.
    """
    backbone = build_backbone(
        problem.backbone,
        problem.data.image_shape[0],
        problem.width,
        torch.Generator().manual_seed(0),
    )
    return _with_head(backbone, problem)


def _with_head(features: nn.Module, problem: FewShot) -> nn.Sequential:
    found: Any = features(torch.zeros(2, *problem.data.image_shape))
    return nn.Sequential(features, nn.Linear(found.shape[1], problem.ways))


def by_task(problem: Preloaded) -> Callable[[], None]:
    """The strict floor: channels-last, task by task, so that the activations of 30 images stay near
    the core.
    """
    net = channels_last_network(problem)

    def step() -> None:
        for support, query, *labels in zip(
            *(problem.batch[name] for name in IMAGES_LABELS), strict=True
        ):
            functional.cross_entropy(net(torch.cat([support, query])), torch.cat(labels)).backward()
        net.zero_grad()

    return step


def one_batch(problem: Preloaded) -> Callable[[], None]:
    """The usual floor: all images as one NCHW batch, as a training loop is written without thought
    of the caches.
    """
    net = plain_network(problem)

    def step() -> None:
        support, query, *labels = (problem.batch[name].flatten(0, 1) for name in IMAGES_LABELS)
        functional.cross_entropy(net(torch.cat([support, query])), torch.cat(labels)).backward()
        net.zero_grad()

    return step
