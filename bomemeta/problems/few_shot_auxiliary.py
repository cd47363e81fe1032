"""The auxiliary task of few-shot classification: an episode's images told apart among ALL classes of
training (Oreshkin et al., TADAM, NeurIPS 2018, section 3.4, which trains on it in turns):

    f_i = CE(queries of episode i) + auxiliary_weight * mean over the episode's images of A
    A   = -log softmax_c(s <z / |z|, w_c / |w_c|>) at the image's class, with smoothed targets

with a vector w_c for each class of training and the scale s in x. An image is so compared with
every class, and not with its episode's alone. A is a part of f and not of g: y does not see it.
Validation, test and prediction have no use for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Encoded, Loss, LossGradient
from bomemeta.core.tree import Params
from bomemeta.data.episodes import EpisodeSource, EpisodeSpec
from bomemeta.errors import ConfigError, DataError

CLASSES = "classes"  # the numbers of an episode's classes, in a batch of training
LOSS = "auxiliary_loss"  # A, in what `encode` returns
NAMES = VECTORS, LOG_SCALE = "auxiliary.vectors", "auxiliary.log_scale"  # x's entries
START_SCALE = 20.0  # of cosines: a few thousand classes are told apart at 10 and more
SMOOTHING = 0.1


def class_count(source: EpisodeSource, spec: EpisodeSpec) -> int:
    """The classes of training. Raises ConfigError where the data set does not number them."""
    given: Any = source
    if not (hasattr(given, "class_count") and hasattr(given, "class_numbers")):
        raise ConfigError(
            f"problem.auxiliary_weight: {type(source).__name__} does not number its classes; it needs the methods class_count and "
            "class_numbers (bomemeta/data/episodes.py), or auxiliary_weight 0"
        )
    return int(given.class_count("train", spec))


def numbers(
    source: EpisodeSource, spec: EpisodeSpec, keys: Sequence[tuple[int, ...]], count: int
) -> Tensor:
    """The classes of training episodes, int64 `[B, ways]`. Raises DataError where the data set gives
    others than `ways` different ones of 0..count-1.
    """
    given: Any = source
    drawn = [torch.as_tensor(given.class_numbers("train", spec, key)) for key in keys]
    for one, key in zip(drawn, keys, strict=True):
        right = one.shape == (spec.ways,) and not one.is_floating_point()
        if not right or len(set(one.tolist())) < spec.ways or one.min() < 0 or one.max() >= count:
            raise DataError(
                f"{type(source).__name__}, split train, episode {key[-1]}: class_numbers() gave {one.tolist()}; wanted {spec.ways} "
                f"different whole numbers of 0..{count - 1}"
            )
    return torch.stack(drawn).long()


def initial(classes: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Params:
    """x's entries: vectors `[classes, width]` and the logarithm of s `[1]`."""
    vectors = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    log_scale = torch.full((1,), START_SCALE, dtype=torch.float64).log()
    return {VECTORS: vectors.div(width**0.5).to(dtype), LOG_SCALE: log_scale.to(dtype)}


def without(upper: Params) -> Params:
    """x without these entries."""
    return {name: tensor for name, tensor in upper.items() if name not in NAMES}


def encoded(
    upper: Params, features: Tensor, supports: int, classes: Tensor | None
) -> dict[str, Tensor]:
    """A of features `[..., n, d]`, of one task or of a stack: the first `supports` rows class after
    class, then the queries so. `classes` `[..., ways]`; None, and {}: not an episode of training.
    """
    if classes is None:
        return {}
    ways, queries = classes.shape[-1], features.shape[-2] - supports
    labels = torch.cat(
        [classes.repeat_interleave(rows // ways, -1) for rows in (supports, queries)], -1
    )
    # Without autocast: a scale of 20 makes the rounding of a cosine in bfloat16 a logit's tenth.
    with torch.autocast(features.device.type, enabled=False):
        vectors = functional.normalize(upper[VECTORS], dim=-1)
        cosines = functional.normalize(features.to(vectors.dtype), dim=-1) @ vectors.mT
        each = functional.cross_entropy(
            (cosines * upper[LOG_SCALE].exp()).flatten(0, -2),
            labels.flatten(),
            label_smoothing=SMOOTHING,
            reduction="none",
        )
    return {LOSS: each.reshape(labels.shape).mean(-1)}


def added(value: Tensor, seen: Encoded, weight: float) -> Tensor:
    """f with its term: `value` is that of the queries."""
    return value + weight * seen[LOSS] if LOSS in seen else value


def added_gradient(
    found: LossGradient, seen: Encoded, weight: float, loss: Loss, in_encoded: bool
) -> LossGradient:
    """The same of f with its gradients, of a stack of tasks."""
    if loss == "lower" or LOSS not in seen:
        return found
    along = {LOSS: torch.full_like(seen[LOSS], weight)} if in_encoded else {}
    return found._replace(value=found.value + weight * seen[LOSS], encoded=found.encoded | along)
