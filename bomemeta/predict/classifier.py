"""A few-shot classifier out of a finished run, with scikit-learn's manners."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.exceptions import NotFittedError

from bomemeta.data.episode_check import checked
from bomemeta.errors import ConfigError, DataError
from bomemeta.predict.inputs import (
    ClassExamples,
    class_array,
    examples_of,
    pixels_of,
    sorted_by_class,
)
from bomemeta.predict.model import TrainedModel, validation_source
from bomemeta.predict.task import Task, few_shot, fitted, images_of, together
from bomemeta.predict.trials import TrialsResult, evaluate_trials, trials_of
from bomemeta.problems.continual import Continual
from bomemeta.problems.few_shot import SPLITS
from bomemeta.run_folder import RunFolder
from bomemeta.trust import config_of

if TYPE_CHECKING:
    from bomemeta.predict.stream import StreamClassifier

Policy = Literal["inductive", "transductive", "running"]
CALIBRATION_EPISODES = 50


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies images by a few examples of each class, on a backbone that was meta-trained.

    `model`: a TrainedModel, or a run's folder. `batch_norm`: which images make the statistics of
    BatchNorms. None: the run's own where that is `running`, else `inductive`, the examples alone: an
    image's class then depends on that image and not on what else is asked. `transductive` lets the
    images of one `predict` call in, as the run's evaluation does by default. `steps`: steps of the
    lower problem, None for as many as in the run's evaluation. `batch_size`: images per forward pass.
    `reject_below`: a similarity below which `predict` answers `reject_label`; see `calibrate`.

    X, everywhere: arrays `[n, H, W, C]` or `[n, H, W]`, tensors `[n, C, H, W]` (uint8, or floats in
    [0, 1]), lists of Pillow images, arrays or paths, or a folder. Images of any size and mode are
    resized and normalised as in training. Labels: numbers, texts or other hashable values, any number
    of classes, and of examples of each.
    """

    classes_: NDArray[Any]

    def __init__(
        self,
        model: TrainedModel | str | os.PathLike[str],
        *,
        batch_norm: Policy | None = None,
        steps: int | None = None,
        batch_size: int = 64,
        reject_below: float | None = None,
        reject_label: Any = None,
    ) -> None:
        self.model = model
        self.batch_norm = batch_norm
        self.steps = steps
        self.batch_size = batch_size
        self.reject_below = reject_below
        self.reject_label = reject_label

    def fit(self, X: Any, y: Any = None) -> FewShotClassifier:
        """Fits to labelled images: one lower problem, solved by the run's own solver.

        `X` may be a folder of class folders, without `y`. Raises DataError where an image or a label
        cannot be used, ConfigError where the run's network has a fixed number of classes.
        """
        return self._fit(examples_of(X, y, self._preprocessing))

    def add_examples(self, X: Any, y: Any = None) -> FewShotClassifier:
        """Adds images, of known or new classes: the same classifier as `fit` on everything, in the
        order in which it came. Raises DataError where the examples were not kept (`save`).
        """
        before = self.examples()
        more = examples_of(X, y, self._preprocessing)
        names = [*before.names(), *more.names()]
        return self._fit(sorted_by_class(torch.cat([before.pixels, more.pixels]), names))

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each image, `[n]`; `reject_label` where no class is as similar as
        `reject_below` asks.
        """
        pixels = self._pixels(X)
        chosen: NDArray[Any] = self.classes_[self._logits(pixels).argmax(1).numpy()]
        if self.reject_below is None:
            return chosen
        mixed = class_array([*chosen.tolist(), self.reject_label])[:-1]
        mixed[self._similarity(pixels).max(1) < self.reject_below] = self.reject_label
        return mixed

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """The softmax of the logits, `[n, classes]`, in the order of `classes_`. Not calibrated."""
        return torch.softmax(self._logits(self._pixels(X)).double(), 1).numpy()

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """The logits, `[n, classes]`."""
        return self._logits(self._pixels(X)).double().numpy()

    def similarity(self, X: Any) -> NDArray[np.float64]:
        """The cosine of each image's features with each class's mean features, `[n, classes]`."""
        return self._similarity(self._pixels(X))

    def transform(self, X: Any) -> NDArray[np.float64]:
        """What the head works on: the images' scaled features `[n, d]`."""
        task = self.task()
        return self._by_parts(self._pixels(X), task.embed).double().numpy()

    def calibrate(self, X: Any = None, y: Any = None, *, keep: float = 0.95) -> float:
        """Sets `reject_below` so that the share `keep` of images of known classes is answered.

        X, y: images of the fitted classes that were not fitted. Without them: the queries of the run's
        own validation episodes, whose data is then read. Returns the threshold.
        """
        if not 0 < keep < 1:
            raise ConfigError(f"keep: got {keep}; wanted a share between 0 and 1, as in 0.95")
        if X is None:
            best = np.concatenate([*self._validation_similarities()])
        else:
            examples = examples_of(X, y, self._preprocessing)
            unknown = sorted({*examples.classes.tolist()} - {*self.classes_.tolist()}, key=str)
            if unknown:
                raise DataError(f"calibrate: class {unknown[0]!r} is not among those fitted")
            best = self._similarity(examples.pixels).max(1)
        self.reject_below = float(np.quantile(best, 1 - keep))
        return self.reject_below

    def _validation_similarities(self) -> Iterator[NDArray[np.float64]]:
        """Of each validation episode: its queries' greatest similarity to a class of it."""
        problem = few_shot(self.trained)
        source, pixels = validation_source(self.trained), self._preprocessing.in_unit_range
        for task in range(CALIBRATION_EPISODES):
            key = (problem.seed, SPLITS.index("validation"), task)
            episode = checked(source, "validation", problem.spec("validation"), key)
            other: FewShotClassifier = clone(self)
            other.fit(pixels(episode.support), episode.support_labels)
            yield other.similarity(pixels(episode.query)).max(1)

    def evaluate_trials(self, trials: Any) -> TrialsResult:
        """Judges copies of this classifier on given trials, each fitted to its own support images:
        the predictions of each, its accuracy, and their mean with its interval.

        `trials`: a list of (support images, their labels, query images, their labels), or a folder or
        .npz as in `predict/trials.py`. Raises DataError that names the trial.
        """
        return TrialsResult([*evaluate_trials(self, trials_of(trials))])

    def save(self, folder: str | os.PathLike[str], *, examples: bool = True) -> Path:
        """Writes the fitted classifier into a new folder: see `predict/saving.py`."""
        from bomemeta.predict.saving import save

        return save(self, Path(folder), examples)

    def export(
        self, file: str | os.PathLike[str], *, format: Literal["torch.export", "onnx"] | None = None
    ) -> Path:
        """Writes one graph: fitted, images to logits; not fitted yet, support images, their labels and
        queries to logits, with the fit in it. See `predict/export.py`.
        """
        from bomemeta.predict.export import export

        return export(self, Path(file), format)

    # What is below belongs to this package.

    @property
    def trained(self) -> TrainedModel:
        """The model, read from its run's folder where that was given."""
        known = self.__dict__.get("_trained")
        if known is None or known[0] is not self.model:
            model = self.model
            made = model if isinstance(model, TrainedModel) else TrainedModel.of_run(str(model))
            few_shot(made)
            self._trained = known = (model, made)
        trained: TrainedModel = known[1]
        return trained

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        own: Policy = few_shot(self.trained).batch_norm
        if self.batch_norm is None:
            return "running" if own == "running" else "inductive"
        if (self.batch_norm == "running") != (own == "running"):
            raise ConfigError(
                f"batch_norm: got {self.batch_norm}; the network was trained with {own}"
            )
        return self.batch_norm

    @property
    def _preprocessing(self) -> Any:
        preprocessing = self.trained.preprocessing
        assert preprocessing is not None, "few_shot is about images"
        return preprocessing

    def _fit(self, examples: ClassExamples) -> FewShotClassifier:
        if len(examples.classes) < 2:
            raise DataError(
                f"y has one class, {examples.classes.tolist()[0]!r}; wanted two or more to tell apart"
            )
        policy = self.policy
        model = self.trained
        self._fitted = None if policy == "transductive" else fitted(model, examples, self.steps)
        self._kept = examples
        self.classes_ = examples.classes
        self.n_examples_ = np.bincount(examples.labels.numpy())
        return self

    def examples(self) -> ClassExamples:
        """The examples of `fit`. Raises DataError where they were not kept."""
        kept: ClassExamples | None = self.__dict__.get("_kept")
        if kept is None:
            self._check_fitted()
            raise DataError(
                "this classifier was saved without its examples (examples=False); fit it on all images"
            )
        return kept

    def restored(
        self, task: Task, classes: NDArray[Any], sizes: list[int], kept: ClassExamples | None
    ) -> FewShotClassifier:
        """This classifier as it was when it was saved."""
        self._fitted = task
        self.__dict__["_kept"] = kept
        self.classes_, self.n_examples_ = classes, np.array(sizes)
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether it has classes."""
        return "classes_" in self.__dict__

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("this classifier has no classes yet: call fit(X, y) first")

    def task(self) -> Task:
        """The fitted task. Raises NotFittedError, ConfigError."""
        self._check_fitted()
        task: Task | None = self.__dict__.get("_fitted")
        if task is None:
            raise ConfigError(
                "batch_norm: transductive has no features of an image alone; use inductive"
            )
        return task

    def _pixels(self, X: Any) -> torch.Tensor:
        self._check_fitted()
        return pixels_of(X, self._preprocessing)

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.__dict__.get("_fitted") is None:
            images = images_of(self.trained, pixels)
            return together(self.trained, self.examples(), images, self.steps)
        return self._by_parts(pixels, self.task().logits)

    def _similarity(self, pixels: torch.Tensor) -> NDArray[np.float64]:
        task = self.task()
        return self._by_parts(pixels, lambda x: task.similarity(task.embed(x))).double().numpy()

    def _by_parts(self, pixels: torch.Tensor, function: Any) -> torch.Tensor:
        """`function` of the images, `batch_size` at a time; an image's row does not depend on it."""
        parts = torch.split(pixels, self.batch_size) if len(pixels) else [pixels]
        with torch.no_grad():
            return torch.cat([function(images_of(self.trained, part)) for part in parts])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return tags


def load_classifier(
    source: str | os.PathLike[str], *, trust: bool = False
) -> FewShotClassifier | StreamClassifier:
    """A classifier from a run's folder (not fitted yet), or from what `save` wrote (fitted); of a run of
    problem continual a StreamClassifier, which its stream has fitted.

    Reads tensors and JSON, and executes what the folder's config names (`trust` as for
    `bomemeta.resume`). Raises ConfigError where the folder is neither, or is not trusted.
    """
    from bomemeta.predict.saving import is_saved
    from bomemeta.predict.stream import StreamClassifier

    if not is_saved(Path(source)):
        folder = RunFolder.open(str(source))
        settings = config_of(folder, trust=trust)
        if isinstance(settings.problem, Continual):
            return StreamClassifier.of_folder(folder, settings)
    return few_shot_classifier(source, trust=trust)


def few_shot_classifier(
    source: str | os.PathLike[str], *, trust: bool = False
) -> FewShotClassifier:
    """A classifier from a run's folder (not fitted yet), or from what `save` wrote (fitted).

    Reads tensors and JSON, and executes what the folder's config names (`trust` as for
    `bomemeta.resume`). Raises ConfigError where the folder is neither, or is not trusted.
    """
    from bomemeta.predict.saving import is_saved, load

    if is_saved(Path(source)):
        return load(Path(source), trust=trust)
    return FewShotClassifier(TrainedModel.of_run(str(source), trust=trust))
