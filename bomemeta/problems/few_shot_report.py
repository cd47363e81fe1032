"""What a report shows of a test episode of problem `few_shot`: its classes, its images and their
features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomemeta.core.problem import Batch
from bomemeta.core.tree import Params
from bomemeta.data.preprocessing import Preprocessing
from bomemeta.problems.few_shot import SPLITS, FewShot


class Pictures(NamedTuple):
    """An episode's images in [0, 1], `[n, C, H, W]`, class after class."""

    support: Tensor
    query: Tensor


def class_names(problem: FewShot, task: int) -> list[str] | None:
    """The names of a test episode's classes, in the order of its labels; None where the data set does
    not say them.
    """
    names = getattr(problem.data, "class_names", None)
    if not callable(names):
        return None
    return [str(name) for name in names("test", problem.spec("test"), _key(problem, task))]


def pictures(problem: FewShot, task: int) -> Pictures | None:
    """A test episode's images; None where they have not one, three or four channels."""
    episode = problem.data.episode("test", problem.spec("test"), _key(problem, task))
    if episode.query.shape[1] not in (1, 3, 4):
        return None
    return Pictures(_visible(problem.data, episode.support), _visible(problem.data, episode.query))


def embedded(problem: FewShot, upper: Params, lower: Params, batch: Batch) -> Tensor:
    """The features that the head sees of one episode's images, support first, `[n, d]`. `lower` is its
    y, which in form network is the network.
    """
    images = torch.cat([batch["support"], batch["query"]])
    own = lower if problem.form == "network" else upper
    # A frozen network's features were computed once, and the batch has them in the images' place.
    features = images if images.dim() == 2 else problem.network.features(own, images)
    return features if problem.form == "network" else problem.scaled_features(upper, features)


def _key(problem: FewShot, task: int) -> tuple[int, ...]:
    return problem.seed, SPLITS.index("test"), task


def _visible(data: Any, images: Tensor) -> Tensor:
    made = getattr(data, "preprocessing", None)
    if isinstance(made, Preprocessing) and made.mean:
        shape = (-1, 1, 1)
        images = images * torch.tensor(made.std).view(shape) + torch.tensor(made.mean).view(shape)
    else:
        lowest, highest = getattr(data, "value_range", (0, 1))
        images = (images - lowest) / (highest - lowest)
    return images.nan_to_num(0).clamp(0, 1)
