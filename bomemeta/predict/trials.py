"""A classifier judged on given trials, each a task of its own: which images it is fitted to, and which it
is asked about.

    FOLDER/TRIAL/support/CLASS/IMAGE, FOLDER/TRIAL/query/CLASS/IMAGE
    FOLDER/TRIAL/class_labels.txt       lines of `TRIAL/test/IMAGE TRIAL/training/IMAGE`, as in Lake, Salakhutdinov and
                                        Tenenbaum's twenty runs of 20-way one-shot classification (Science, 2015)
    FILE.npz                            support [t, n, ...], support_labels [t, n], query [t, m, ...], query_labels [t, m]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sklearn.base import clone

from bomemeta.data import archives
from bomemeta.errors import DataError
from bomemeta.intervals import half_width
from bomemeta.predict.inputs import labelled_files

if TYPE_CHECKING:
    from bomemeta.predict.classifier import FewShotClassifier

PAIRS = "class_labels.txt"
ARRAYS = ("support", "support_labels", "query", "query_labels")


class Trial(NamedTuple):
    """Images and labels as of `FewShotClassifier.fit` and `score`."""

    name: str
    support: Any
    support_labels: Any
    query: Any
    query_labels: Sequence[Any]


@dataclass(frozen=True)
class TrialOutcome:
    """One trial: a prediction for each of its queries, in their order."""

    name: str
    predictions: list[Any]
    labels: list[Any]

    @property
    def accuracy(self) -> float:
        hits = [bool(a == b) for a, b in zip(self.predictions, self.labels, strict=True)]
        return sum(hits) / len(hits)


@dataclass(frozen=True)
class TrialsResult:
    """All trials, in their order."""

    trials: list[TrialOutcome]

    @property
    def accuracy(self) -> float:
        """The mean of the trials' accuracies."""
        return float(np.mean([each.accuracy for each in self.trials]))

    @property
    def half_width(self) -> float | None:
        """Of the mean's 95 % interval, over trials by Student's t; None for one trial."""
        if len(self.trials) < 2:
            return None
        return half_width(
            float(np.var([each.accuracy for each in self.trials], ddof=1)), len(self.trials)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the mean, and of each trial its accuracy, predictions and labels."""
        return {
            "accuracy": self.accuracy,
            "half_width": self.half_width,
            "trials": [
                {
                    "name": each.name,
                    "accuracy": each.accuracy,
                    "predictions": [_plain(value) for value in each.predictions],
                    "labels": [_plain(value) for value in each.labels],
                }
                for each in self.trials
            ],
        }


def evaluate_trials(
    classifier: FewShotClassifier, trials: Iterator[Trial] | Sequence[Trial]
) -> Iterator[TrialOutcome]:
    """Fits a copy of the classifier to each trial's support and asks it about the query images.

    Raises DataError that names the trial.
    """
    for trial in trials:
        try:
            labels = list(trial.query_labels)
            fitted = clone(classifier).fit(trial.support, trial.support_labels)
            unknown = sorted({*labels} - {*fitted.classes_.tolist()}, key=str)
            if unknown:
                raise DataError(f"class {unknown[0]!r} of a query is not among its support's")
            if not labels:
                raise DataError("no query images")
            predictions = fitted.predict(trial.query).tolist()
            if len(predictions) != len(labels):
                raise DataError(f"{len(predictions)} query images and {len(labels)} labels")
        except DataError as error:
            raise DataError(f"trial {trial.name}: {error}") from error
        yield TrialOutcome(trial.name, predictions, labels)


def trials_of(given: Any) -> list[Trial]:
    """What a user gave: a folder, a file, or a sequence of (support, support labels, query, query
    labels). Raises DataError.
    """
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        return _of_folder(path) if path.is_dir() else _of_archive(path)
    found = []
    for number, each in enumerate(given):
        if isinstance(each, Trial):
            found.append(each)
        elif isinstance(each, Sequence) and len(each) == 4:
            found.append(Trial(str(number), each[0], each[1], each[2], _listed(each[3])))
        else:
            raise DataError(
                f"trial {number}: got {type(each).__name__}; wanted four: support images, their labels, query images, their labels"
            )
    if not found:
        raise DataError("trials: got none; wanted at least one")
    return found


def _of_folder(root: Path) -> list[Trial]:
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    found = []
    for folder in folders:
        if (folder / PAIRS).is_file():
            found.append(_of_pairs(folder))
        elif (folder / "support").is_dir() and (folder / "query").is_dir():
            found.append(_of_parts(folder))
    if not found:
        raise DataError(
            f"{root.absolute()}: no trials; wanted TRIAL/support/CLASS/IMAGE and TRIAL/query/CLASS/IMAGE, or TRIAL/{PAIRS}"
        )
    return found


def _of_parts(folder: Path) -> Trial:
    parts: list[list[Any]] = []
    for part in ("support", "query"):
        pairs = labelled_files(folder / part)
        if loose := [path for path, label in pairs if not label]:
            raise DataError(
                f"{loose[0]}: is in no class folder; wanted {folder / part}/CLASS/IMAGE"
            )
        parts += [[path for path, _ in pairs], [label for _, label in pairs]]
    return Trial(folder.name, *parts)


def _of_pairs(folder: Path) -> Trial:
    """A class is its training image's name."""
    try:
        lines = (folder / PAIRS).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / PAIRS} cannot be read: {error}") from error
    query, labels, support = [], [], {}
    for number, line in enumerate(lines, start=1):
        if not (entries := line.split()):
            continue
        if len(entries) != 2:
            raise DataError(
                f"{folder / PAIRS}:{number}: got {line!r}; wanted a query image and its class's image"
            )
        test, training = (folder.parent / word for word in entries)
        query.append(test)
        labels.append(training.stem)
        support[training.stem] = training
    # Other training images of the run are classes too, of which no query is.
    for image in sorted((folder / "training").glob("*.png")):
        support.setdefault(image.stem, image)
    return Trial(folder.name, [support[name] for name in support], list(support), query, labels)


def _of_archive(path: Path) -> list[Trial]:
    arrays = archives.read(path, list(ARRAYS))
    counts = {name: len(arrays[name]) for name in ARRAYS}
    if len({*counts.values()}) != 1 or not all(arrays[name].ndim >= 2 for name in ARRAYS):
        shapes = ", ".join(f"{name} {list(arrays[name].shape)}" for name in ARRAYS)
        raise DataError(
            f"{path}: got {shapes}; wanted support [t, n, H, W] or [t, n, H, W, C], support_labels [t, n], and query and query_labels alike"
        )
    return [
        Trial(
            str(t),
            arrays["support"][t],
            arrays["support_labels"][t],
            arrays["query"][t],
            arrays["query_labels"][t].tolist(),
        )
        for t in range(counts["support"])
    ]


def _listed(labels: Any) -> list[Any]:
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
