"""One task of a trained few-shot model: its examples, its head, and logits of new images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bomemeta.core.problem import Batch
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError
from bomemeta.predict.inputs import ClassExamples
from bomemeta.predict.model import Adapted, TrainedModel
from bomemeta.predict.norms import Moments, fixed_at, moments_of
from bomemeta.problems.few_shot import FewShot
from bomemeta.problems.few_shot_predict import for_classes, head_inputs, head_weight
from bomemeta.sections import label


@dataclass(frozen=True)
class Head:
    """What a task has of its own once it is fitted: kilobytes. It needs neither examples nor solver.

    logits = Z W, with Z as `FewShot.head_inputs` gives it; `prototypes` are the classes' mean
    features, for similarities.
    """

    weight: Tensor  # [d, ways]; [d + 1, ways] where the head has a bias
    prototypes: Tensor  # [ways, d], of length 1
    moments: dict[str, Moments]  # of BatchNorms, by layer; none where these are the network's own
    network: Params  # form network: the adapted parameters; else none


class Task:
    """Logits of a task's classes, for images of float32 `[n, C, H, W]`."""

    def __init__(self, model: TrainedModel, problem: FewShot, head: Head) -> None:
        self._model, self._problem, self.head = model, problem, head
        self.module: nn.Module = fixed_at(problem.module(model.upper | head.network), head.moments)

    def embed(self, images: Tensor) -> Tensor:
        """What the head works on: the scaled features `[n, d]`."""
        with torch.no_grad():
            features: Tensor = self.module(images)
            if self._problem.form == "network":
                return features
            return self._problem.scaled_features(self._model.upper, features)

    def logits(self, images: Tensor) -> Tensor:
        """`[n, ways]`."""
        return self.of_features(self.embed(images))

    def of_features(self, features: Tensor) -> Tensor:
        """Logits `[n, ways]` from what `embed` gave."""
        if self._problem.form == "network":
            return self._problem.logits(self.head.network, features)
        return head_inputs(self._problem, features) @ self.head.weight

    def similarity(self, features: Tensor) -> Tensor:
        """Cosine `[n, ways]` of what `embed` gave with every class's mean."""
        return torch.nn.functional.normalize(features, dim=-1) @ self.head.prototypes.mT


def few_shot(model: TrainedModel) -> FewShot:
    """The model's problem, which a classifier can be made of. Raises ConfigError for another."""
    if not isinstance(model.problem, FewShot):
        raise ConfigError(
            f"problem {label(model.problem)} classifies no images: a classifier is of few_shot. "
            "`result.adapt(batch)` gives y of a new task of any problem"
        )
    return model.problem


def fitted(model: TrainedModel, examples: ClassExamples, steps: int | None) -> Task:
    """Fits a task to its examples with the run's own lower problem and solver."""
    problem = for_classes(few_shot(model), torch.bincount(examples.labels).tolist())
    support = images_of(model, examples.pixels)
    none = support[:0]
    adapted = model.adapt(task_batch(support, examples.labels, none), steps, problem)
    lower = {name: tensor[0] for name, tensor in adapted.lower.items()}
    network = lower if problem.form == "network" else {}
    module = problem.module(model.upper | network)
    moments = moments_of(module, support) if problem.batch_norm != "running" else {}
    with torch.no_grad():
        features = fixed_at(module, moments)(support)
        if problem.form == "head":
            features = problem.scaled_features(model.upper, features)
    prototypes = torch.stack(
        [features[examples.labels == number].mean(0) for number in range(len(examples.classes))]
    )
    weight = torch.empty(0) if network else head_weight(problem, first_of(adapted), lower, features)
    head = Head(weight, torch.nn.functional.normalize(prototypes, dim=-1), moments, network)
    return Task(model, problem, head)


def together(
    model: TrainedModel, examples: ClassExamples, images: Tensor, steps: int | None
) -> Tensor:
    """Logits `[n, ways]` with the transductive policy: all images are normalised together, so each
    depends on the others. It is what the run's own evaluation computes.
    """
    problem = for_classes(few_shot(model), torch.bincount(examples.labels).tolist())
    batch = task_batch(images_of(model, examples.pixels), examples.labels, images)
    adapted = model.adapt(batch, steps, problem)
    lower = {name: tensor[0] for name, tensor in adapted.lower.items()}
    with torch.no_grad():
        one = {name: tensor[0] for name, tensor in batch.items()}
        logits: Tensor = problem.query_logits(first_of(adapted), lower, one)
    return logits


def task_batch(support: Tensor, labels: Tensor, query: Tensor) -> Batch:
    """One task as `FewShot.load` gives it; the queries' labels are not known and not used."""
    return {
        "support": support[None],
        "support_labels": labels[None],
        "query": query[None],
        "query_labels": torch.zeros(1, len(query), dtype=torch.int64),
    }


def first_of(adapted: Adapted) -> dict[str, Tensor]:
    """The encoded data of the one task."""
    if adapted.encoded and all(name in adapted.lower for name in adapted.encoded):
        return adapted.encoded  # x itself, which has no task axis
    return {name: tensor[0] for name, tensor in adapted.encoded.items()}


def images_of(model: TrainedModel, pixels: Tensor) -> Tensor:
    """Pixels `[n, C, H, W]` as the network is given them, normalised, in the run's dtype."""
    assert model.preprocessing is not None, "a classifier is of a problem about images"
    whole = pixels if pixels.is_floating_point() else pixels.float().div_(255)
    images: Tensor = model.preprocessing.normalised(whole).to(model.problem.dtype)
    return images
