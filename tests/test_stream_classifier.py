"""The classifier that a stream left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_extend import BOME, PLAIN, source, write

import bomemeta as bm
from bomemeta.errors import ConfigError, DataError

ER: dict[str, Any] = {"name": "lower_only"}


def arrays(path: str) -> tuple[Any, Any]:
    with np.load(path) as found:
        return found["x_test"], found["y_test"]


@pytest.mark.parametrize(
    ("solver", "problem"),
    [
        (BOME, {}),
        (ER, {**PLAIN, "objective": "er", "protocol": "class_incremental"}),
        (ER, {**PLAIN, "objective": "er", "stream": "split"}),
    ],
    ids=["controller", "class-incremental", "task-incremental"],
)
def test_it_answers_as_the_runs_own_test(
    solver: dict[str, Any], problem: dict[str, Any], tmp_path: Path
) -> None:
    """Every test row is in question: 20 of each class, two classes a task."""
    path = write(tmp_path / "first.npz", ["ant", "bee", "cat", "dog"])
    config = source({"first": path}, solver, **{**problem, "test_samples_per_task": None})
    result = bm.train(config, output_dir=str(tmp_path / "run"))
    rows, labels = arrays(path)
    for classifier in (result.classifier(), bm.load_classifier(tmp_path / "run")):
        assert classifier.classes_.tolist() == ["ant", "bee", "cat", "dog"]
        for task, names in enumerate((["ant", "bee"], ["cat", "dog"])):
            of_task = np.isin(labels, names)
            given = None if problem.get("protocol") == "class_incremental" else task
            score = classifier.score(rows[of_task], labels[of_task], task=given)
            assert score == pytest.approx(result.metrics[f"accuracy_task_{task:02d}"], abs=1e-6)
            sums = classifier.predict_proba(rows[:3], task=given).sum(1)
            assert sums == pytest.approx(1)
            if given is not None:  # the others are not in question
                assert set(classifier.predict(rows, task=given).tolist()) <= set(names)


def test_of_an_extended_stream(tmp_path: Path) -> None:
    first, new = (write(tmp_path / f"{i}.npz", c) for i, c in enumerate((list("abcd"), list("ef"))))
    bm.train(source({"first": first}, BOME), output_dir=str(tmp_path / "run"))
    result = bm.extend(tmp_path / "run", new)
    classifier = result.classifier()
    assert (classifier.tasks, classifier.classes_.tolist()) == (3, list("abcdef"))
    assert set(classifier.predict(arrays(new)[0], task=2).tolist()) <= {"e", "f"}


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "first.npz", [0, 1, 2, 3])
    result = bm.train(source({"first": path}, BOME))
    with pytest.raises(ConfigError, match="nothing was kept: give output_dir"):
        result.classifier()
    kept = bm.train(source({"first": path}, BOME), output_dir=str(tmp_path / "run")).classifier()
    rows = arrays(path)[0]
    with pytest.raises(ConfigError, match=r"task: missing; .* 0 to 1"):
        kept.predict(rows)
    with pytest.raises(ConfigError, match="task: got 2; wanted 0 to 1"):
        kept.predict(rows, task=2)
    with pytest.raises(DataError, match=r"X: got \[80, 3\]; wanted \[n, ...\] with rows of 16"):
        kept.predict(np.zeros((80, 3), np.uint8), task=0)
    with pytest.raises(DataError, match=r"X: got torch\.int64; wanted uint8 or floats"):
        kept.predict(rows.astype(int), task=0)
