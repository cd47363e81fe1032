"""A regressor out of a run, and a classifier judged on given trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from test_predict import CONFIG, EPISODES, episodes
from test_predict import trained as trained_classifier
from typer.testing import CliRunner

import bomemeta as bm
from bomemeta.assembly import build_problem
from bomemeta.cli import app
from bomemeta.config import load_config
from bomemeta.doctor.data import _spec
from bomemeta.errors import ConfigError, DataError
from bomemeta.predict import FewShotRegressor, TrialsResult
from bomemeta.predict.trials import trials_of

REGRESSION: dict[str, Any] = {
    "problem": {"name": "few_shot_regression", "hidden": [8], "test_queries": 7},
    "data": {"dataset": "sinusoid"},
    "solver": {
        "name": "bome",
        "barrier": "per_task",
        "inner_steps": 2,
        "adapt_steps": 2,
        "inner_lr": 0.01,
        "lower_lr": 0.01,
    },
    "steps": 2,
    "tasks_per_step": 2,
    "evaluation": {"episodes": 3},
    "log": {"tensorboard": False},
}


@pytest.mark.parametrize(
    "problem", [{}, {"head": "linear"}, {"form": "network"}], ids=["ridge", "linear", "network"]
)
def test_a_regressor_answers_as_the_runs_own_evaluation(problem: dict[str, Any]) -> None:
    config = {**REGRESSION, "problem": {**REGRESSION["problem"], **problem}}
    result = bm.train(config)
    assert result.config is not None
    batch = build_problem(result.config).load(range(3), 0, "test")
    losses = []
    for support, targets, query, wanted in zip(*batch.values(), strict=True):
        found = result.regressor().fit(support, targets).predict(query)
        losses.append(torch.nn.functional.mse_loss(torch.from_numpy(found), wanted))
    assert float(torch.stack(losses).mean()) == pytest.approx(result.metrics["test_loss"], rel=1e-6)


def test_a_regressor_has_scikit_learns_manners(tmp_path: Path) -> None:
    result = bm.train(REGRESSION, output_dir=str(tmp_path / "run"))
    rng = np.random.default_rng(0)
    x = rng.uniform(-5, 5, (12, 1))
    y = np.sin(x[:, 0])
    regressor = FewShotRegressor(tmp_path / "run").fit(x, y)
    assert regressor.predict(x).shape == (12,)
    assert result.regressor().fit(x, y[:, None]).predict(x).shape == (12, 1)
    np.testing.assert_array_equal(result.regressor().fit(x, y).predict(x), regressor.predict(x))
    parts = clone(regressor).fit(x[:5], y[:5]).add_examples(x[5:], y[5:])
    np.testing.assert_array_equal(parts.predict(x), regressor.predict(x))
    alone = np.concatenate([regressor.predict(x[i : i + 1]) for i in range(12)])
    np.testing.assert_allclose(alone, regressor.predict(x), rtol=1e-5, atol=1e-6)
    assert len(cross_val_score(regressor, x, y, cv=3)) == 3
    with pytest.raises(NotFittedError, match="call fit"):
        clone(regressor).predict(x)
    for inputs, targets, message in (
        (x[:, 0], y, r"X: got \[12\]; wanted \[n, 1\]"),
        (x, np.zeros((12, 2)), r"y: got \[12, 2\]; wanted \[n, 1\] or \[n\]"),
        (x[:3], y, "X has 3 rows and y 12"),
        (x * np.nan, y, "X: NaN"),
        (x[:0], y[:0], "at least one"),
        ([["a"]], [1], "X: wanted numbers"),
    ):
        with pytest.raises(DataError, match=message):
            clone(regressor).fit(inputs, targets)


def test_a_regressor_is_of_regression_alone(tmp_path: Path) -> None:
    result = trained_classifier(tmp_path)
    with pytest.raises(ConfigError, match="problem few_shot is no regression"):
        result.regressor()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> bm.Result:
    return trained_classifier(tmp_path_factory.mktemp("trials"))


def test_trials_of_a_runs_episodes_are_its_evaluation(run: bm.Result) -> None:
    drawn = episodes(run)
    given = [(e.support, e.support_labels, e.query, e.query_labels) for e in drawn]
    classifier = run.classifier().set_params(batch_norm="transductive")
    result = classifier.evaluate_trials(given)
    assert result.accuracy == pytest.approx(run.metrics["test_accuracy"], abs=1e-6)
    assert [len(each.predictions) for each in result.trials] == [12] * EPISODES
    assert [each.accuracy for each in result.trials] == [
        np.mean(np.array(each.predictions) == np.array(each.labels)) for each in result.trials
    ]
    assert result.half_width is not None
    assert TrialsResult(result.trials[:1]).half_width is None
    assert json.loads(json.dumps(result.to_dict()))["trials"][1]["name"] == "1"


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_trials_in_folders_in_lakes_form_and_in_an_archive(run: bm.Result, tmp_path: Path) -> None:
    """Each is the same two trials; a query is its class's own picture, so all are right."""
    folders, lake = tmp_path / "folders", tmp_path / "lake"
    arrays: dict[str, list[Any]] = {}
    for t in range(2):
        name, lines, pixels = f"run{t:02d}", [], []
        for c in range(3):
            seed = 10 * t + c
            for root in (folders / name / "support", folders / name / "query"):
                picture(root / f"class{c}" / "a.png", seed)
            picture(lake / name / "training" / f"class{c}.png", seed)
            picture(lake / name / "test" / f"item{c}.png", seed)
            lines.append(f"{name}/test/item{c}.png {name}/training/class{c}.png")
            pixels.append(np.asarray(Image.open(lake / name / "test" / f"item{c}.png")))
        (lake / name / "class_labels.txt").write_text("\n".join(lines) + "\n")
        for part in ("support", "query"):
            arrays.setdefault(part, []).append(np.stack(pixels))
            arrays.setdefault(f"{part}_labels", []).append(["class0", "class1", "class2"])
    np.savez(tmp_path / "t.npz", **{name: np.array(value) for name, value in arrays.items()})
    reported = []
    for where in (folders, lake, tmp_path / "t.npz"):
        done = CliRunner().invoke(app, ["trials", str(run.run_dir), str(where), "--json"])
        assert done.exit_code == 0, done.output
        reported.append(json.loads(done.output))
        assert reported[-1]["accuracy"] == 1.0
    assert [each["name"] for each in reported[0]["trials"]] == ["run00", "run01"]
    assert reported[0] == reported[1]
    assert reported[1]["trials"][0]["predictions"] == reported[2]["trials"][0]["predictions"]
    text = CliRunner().invoke(app, ["trials", str(run.run_dir), str(folders)]).output
    assert text.splitlines() == ["run00\t100.00 %", "run01\t100.00 %", "2 trials: 100.00 +- 0.00 %"]


def test_what_is_wrong_with_trials_is_said(run: bm.Result, tmp_path: Path) -> None:
    episode = episodes(run)[0]
    good = (episode.support, episode.support_labels, episode.query, episode.query_labels)
    for given, message in (
        ([], "trials: got none"),
        ([good[:3]], "trial 0: got tuple; wanted four"),
        ([(*good[:3], [*good[3].tolist()[:-1], 9])], "trial 0: class 9 of a query is not among"),
        ([good, (*good[:3], good[3][:-1])], "trial 1: 12 query images and 11 labels"),
        ([(*good[:2], [], [])], "trial 0: no query images"),
        (tmp_path / "none.npz", "does not exist"),
        (tmp_path, "no trials; wanted TRIAL/support/CLASS/IMAGE"),
    ):
        with pytest.raises(DataError, match=message):
            run.classifier().evaluate_trials(given)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "class_labels.txt").write_text("one two three\n")
    with pytest.raises(DataError, match=r"class_labels\.txt:1: got 'one two three'"):
        trials_of(tmp_path)
    np.savez(
        tmp_path / "x.npz",
        **{n: np.zeros(3) for n in ("support", "support_labels", "query", "query_labels")},
    )
    with pytest.raises(DataError, match=r"got support \[3\]"):
        trials_of(tmp_path / "x.npz")


def test_a_threshold_from_the_runs_validation_classes(run: bm.Result) -> None:
    """The share `keep` of the validation episodes' queries is above it, whatever was fitted."""
    episode = episodes(run)[0]
    classifier = run.classifier().fit(episode.support, episode.support_labels)
    low, high = classifier.calibrate(keep=0.9), classifier.calibrate(keep=0.5)
    assert -1 <= low < high <= 1
    assert classifier.reject_below == high
    assert run.classifier().fit(episode.support, episode.support_labels).calibrate(keep=0.9) == low


def test_doctor_looks_for_as_many_classes_as_testing_wants() -> None:
    config = {**CONFIG, "problem": {**CONFIG["problem"], "test_ways": 5}}  # type: ignore[dict-item]
    problem = build_problem(load_config(config))
    assert (_spec(problem, "train").ways, _spec(problem, "test").ways) == (3, 5)
