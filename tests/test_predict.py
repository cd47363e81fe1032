"""A classifier out of a run: the run's own evaluation, scikit-learn's manners, saving, export, commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline
from typer.testing import CliRunner

from bomemeta.api import load, train
from bomemeta.assembly import build_problem
from bomemeta.cli import app
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.data.episodes import Episode, EpisodeSpec
from bomemeta.errors import ConfigError, DataError
from bomemeta.predict import FewShotClassifier, load_classifier
from bomemeta.result import Result

EPISODES = 4
CONFIG = {
    "imports": [str(Path(__file__).with_name("toy.py"))],
    "problem": {
        "name": "few_shot",
        "ways": 3,
        "shots": 2,
        "queries": 2,
        "test_queries": 4,
        "width": 4,
    },
    "data": {"dataset": "toy"},
    "solver": {"name": "bome", "barrier": "per_task", "inner_steps": 2, "adapt_steps": 2},
    "steps": 2,
    "tasks_per_step": 2,
    "evaluation": {"episodes": EPISODES},
    "log": {"tensorboard": False},
}


def trained(folder: Path, **problem: Any) -> Result:
    config: dict[str, Any] = {**CONFIG, "problem": {**CONFIG["problem"], **problem}}  # type: ignore[dict-item]
    return train(config, output_dir=str(folder / "run"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return trained(tmp_path_factory.mktemp("predict"))


def episodes(result: Result) -> list[Episode]:
    assert result.config is not None
    data: Any = result.config.data
    data.prepare()
    return [data.episode("test", EpisodeSpec(3, 2, 4), (0, 2, task)) for task in range(EPISODES)]


def fitted(result: Result, episode: Episode, **options: Any) -> FewShotClassifier:
    made = FewShotClassifier(result.classifier().model, **options)
    return made.fit(episode.support, episode.support_labels)


@pytest.mark.parametrize(
    "problem",
    [
        {},
        {"head": "ridge"},
        {"head": "span"},
        {"head": "protonet"},
        {"head": "cosine"},
        {"head": "r2d2"},
        {"form": "network"},
    ],
    ids=str,
)
def test_it_answers_as_the_runs_own_evaluation(tmp_path: Path, problem: dict[str, Any]) -> None:
    result = trained(tmp_path, **problem)
    for policy, key in (
        ("transductive", "test_accuracy"),
        ("inductive", "test_accuracy_inductive"),
    ):
        scores = [
            fitted(result, one, batch_norm=policy).score(one.query, one.query_labels.numpy())
            for one in episodes(result)
        ]
        assert np.mean(scores) == pytest.approx(result.metrics[key], abs=1e-7), policy


def test_its_logits_have_the_bits_of_the_runs_own_evaluation(result: Result) -> None:
    assert result.config is not None
    problem: Any = build_problem(result.config)
    model = result.classifier().trained
    batch = problem.load(range(EPISODES), 0, "test")
    oracle = LocalOracle(problem, model.upper, batch, "loop", differentiable=False)
    lower = model.solver.adapt(oracle, None)
    for task, episode in enumerate(episodes(result)):
        encoded, y, one = (
            {name: tensor[task] for name, tensor in parts.items()}
            for parts in (oracle.encoded, lower, batch)
        )
        classifier = fitted(result, episode, batch_norm="transductive")
        logits = problem.query_logits(encoded, y, one).double().numpy()
        assert np.array_equal(classifier.decision_function(episode.query), logits)


def test_an_image_alone_gets_the_class_that_it_gets_among_others(result: Result) -> None:
    episode = episodes(result)[0]
    classifier = fitted(result, episode)
    together = classifier.decision_function(episode.query)
    alone = np.concatenate([classifier.decision_function(image[None]) for image in episode.query])
    assert alone == pytest.approx(together, abs=1e-5)  # sums of other lengths of vector


def test_more_examples_and_new_classes_are_as_a_fit_on_everything(result: Result) -> None:
    episode = episodes(result)[0]
    images, names = episode.support, [["dog", 7, "cat"][int(i)] for i in episode.support_labels]
    whole = FewShotClassifier(result.classifier().model).fit(images, names)
    first = FewShotClassifier(result.classifier().model).fit(images[:4], names[:4])
    assert first.classes_.tolist() == [7, "dog"]
    grown = first.add_examples(images[4:5], names[4:5]).add_examples(images[5:], names[5:])
    assert grown.classes_.tolist() == whole.classes_.tolist() == [7, "cat", "dog"]
    assert grown.n_examples_.tolist() == [2, 2, 2]
    assert np.array_equal(grown.predict_proba(episode.query), whole.predict_proba(episode.query))


def test_unequal_classes_and_many_of_them(result: Result) -> None:
    one = episodes(result)[0]
    labels = np.array([0, 0, 0, 1, 2, 2])
    classifier = FewShotClassifier(result.classifier().model).fit(one.support, labels)
    means = [classifier.transform(one.support[labels == i]).mean(0) for i in range(3)]
    cosines = [mean / np.linalg.norm(mean) for mean in means]
    features = classifier.transform(one.query)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert classifier.similarity(one.query) == pytest.approx(
        features @ np.array(cosines).T, abs=1e-5
    )
    images = torch.cat([episode.query for episode in episodes(result)])
    many = FewShotClassifier(result.classifier().model).fit(images, range(len(images)))
    assert len(many.classes_) == len(images) > 40


def test_scikit_learns_tools_work(result: Result) -> None:
    one = episodes(result)[0]
    images = np.moveaxis(torch.cat([one.support, one.query]).numpy(), 1, -1)
    names = np.array(["a", "b", "c"])[torch.cat([one.support_labels, one.query_labels]).numpy()]
    pipeline = Pipeline([("classifier", clone(result.classifier()))])
    assert len(cross_val_score(pipeline, images, names, cv=3)) == 3
    copied = clone(FewShotClassifier(result.classifier().model, steps=3, reject_below=0.5))
    assert copied.get_params(deep=False)["steps"] == 3
    probabilities = result.classifier().fit(images, names).predict_proba(images)
    assert probabilities.sum(1) == pytest.approx(np.ones(len(images)))


def test_none_of_these(result: Result) -> None:
    one = episodes(result)[0]
    classifier = fitted(result, one, reject_label="none")
    threshold = classifier.calibrate(one.query, one.query_labels, keep=0.75)
    best = classifier.similarity(one.query).max(1)
    assert (best >= threshold).mean() == pytest.approx(0.75, abs=1 / len(best))
    answers = classifier.predict(one.query)
    assert [answer == "none" for answer in answers] == [bool(b < threshold) for b in best]


def test_a_saved_classifier_is_the_same_and_a_changed_file_is_refused(
    result: Result, tmp_path: Path
) -> None:
    one = episodes(result)[0]
    classifier = fitted(result, one)
    folder = classifier.save(tmp_path / "clf")
    again = load_classifier(folder)
    assert np.array_equal(again.predict_proba(one.query), classifier.predict_proba(one.query))
    more = again.add_examples(one.query[:1], [0])
    assert more.n_examples_.sum() == len(one.support) + 1
    assert (folder / "head.safetensors").stat().st_size < 20_000
    with pytest.raises(ConfigError, match="is not empty"):
        classifier.save(folder)
    small = load_classifier(classifier.save(tmp_path / "small", examples=False))
    with pytest.raises(DataError, match="without its examples"):
        small.add_examples(one.query[:1], [0])
    data = bytearray((folder / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "head.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="was changed or damaged"):
        load_classifier(folder)


def test_a_graph_computes_the_same(result: Result, tmp_path: Path) -> None:
    one = episodes(result)[0]
    classifier = fitted(result, one)
    file = classifier.export(tmp_path / "model.pt2")
    logits, features = torch.export.load(file).module()(one.query)
    assert logits.numpy() == pytest.approx(classifier.decision_function(one.query), abs=1e-4)
    assert features.numpy() == pytest.approx(classifier.transform(one.query), abs=1e-4)
    with pytest.raises(ConfigError, match="not written over"):
        classifier.export(file)
    with pytest.raises(ConfigError, match=r"\.pt2 \(torch.export\) or \.onnx"):
        classifier.export(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "problem",
    [
        {},
        {"head": "span", "feature_scale": 1.0},  # longer features make its steps diverge
        {"head": "cosine", "neck": "linear", "backbone": "test_predict:own_net"},
        {"head": "r2d2", "backbone": "test_predict:own_net", "batch_norm": "running"},
    ],
    ids=str,
)
def test_a_graph_with_the_fit_in_it(tmp_path: Path, problem: dict[str, Any]) -> None:
    result = trained(tmp_path, **problem)
    graph = torch.export.load(result.classifier().export(tmp_path / "m.pt2")).module()
    one = episodes(result)[0]
    # Other sizes than any that it was made with, unequal, and not class after class.
    for labels in ([2, 0, 1, 1, 0, 0], [1, 0, 1, 0]):
        support = one.support[: len(labels)]
        fitted = FewShotClassifier(result.classifier().model).fit(support, labels)
        hot = torch.nn.functional.one_hot(torch.tensor(labels)).float()
        logits, features = graph(support, hot, one.query[:5])
        assert logits.numpy() == pytest.approx(fitted.decision_function(one.query[:5]), abs=1e-3)
        assert features.numpy() == pytest.approx(fitted.transform(one.query[:5]), abs=1e-4)


def own_net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=4), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
    )


def test_what_has_no_graph_with_the_fit_in_it_says_so(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", form="network")
    with pytest.raises(ConfigError, match="adapts its whole network"):
        whole.classifier().export(tmp_path / "m.pt2")
    svm = trained(tmp_path / "c", head="svm")
    with pytest.raises(ConfigError, match="head svm is solved by an iteration"):
        svm.classifier().export(tmp_path / "m.pt2")
    config: Any = {**CONFIG, "solver": {**CONFIG["solver"], "inner_optimizer": "adam"}}  # type: ignore[dict-item]
    other = train(config, output_dir=str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="fit the classifier and export that"):
        other.classifier().export(tmp_path / "m.pt2")


def test_onnx(result: Result, tmp_path: Path) -> None:
    runtime = pytest.importorskip(
        "onnxruntime", reason="needs the extra onnx: uv sync --extra onnx"
    )
    pytest.importorskip("onnxscript", reason="needs the extra onnx: uv sync --extra onnx")
    one = episodes(result)[0]
    classifier = fitted(result, one)
    session = runtime.InferenceSession(classifier.export(tmp_path / "m.onnx").read_bytes())
    logits, _ = session.run(None, {"images": one.query.numpy()})
    assert logits == pytest.approx(classifier.decision_function(one.query), abs=1e-4)
    # With the fit in it, for other numbers of images and classes.
    file = result.classifier().export(tmp_path / "learner.onnx")
    hot = np.eye(3, dtype=np.float32)[one.support_labels.numpy()]
    given = {"support": one.support.numpy(), "labels": hot, "query": one.query.numpy()}
    logits, _ = runtime.InferenceSession(file.read_bytes()).run(None, given)
    assert logits == pytest.approx(classifier.decision_function(one.query), abs=1e-4)


def test_the_module_and_y_of_a_new_task(result: Result) -> None:
    one = episodes(result)[0]
    features = result.module()(one.support)
    assert features.shape == (6, features.shape[1])
    batch = {name: tensor[None] for name, tensor in one._asdict().items()}
    lower = result.adapt(batch)
    assert lower["head"].shape[0] == 1
    assert result.run_dir is not None
    again = load(result.run_dir)
    assert torch.equal(again.adapt(batch)["head"], lower["head"])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 16, 16), [0], "2 images and y 1 labels"),
        (torch.zeros(2, 1, 16, 16), [0, None], "label 1 is None"),
        (torch.zeros(2, 1, 16, 16), [0, 0], "one class"),
        (torch.zeros(2, 1, 16, 16) + float("nan"), [0, 1], "outside"),
        (torch.zeros(2, 1, 16, 16), None, "y: missing"),
        (np.zeros((2, 5)), [0, 1], "shape"),
        (["nosuch.png", "other.png"], [0, 1], "nosuch.png cannot be read"),
        ([], [], "no images"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    result: Result, images: Any, labels: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        result.classifier().fit(images, labels)


def test_from_folders_of_photographs_on_the_command_line(result: Result, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, name in enumerate(("sky", "grass")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            array = rng.integers(0, 60, (40, 30, 3), np.uint8)
            array[:, :: number + 2] += 150
            Image.fromarray(array).save(tmp_path / "photos" / name / f"{i}.jpg")
    runner, clf = CliRunner(), str(tmp_path / "clf")
    arguments = ["fit", str(result.run_dir), str(tmp_path / "photos"), "--out", clf]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "sky: 3 examples" in done.output
    asked = [str(tmp_path / "photos" / "sky"), str(tmp_path / "photos" / "grass" / "1.jpg")]
    done = runner.invoke(app, ["predict", clf, *asked, "--json"])
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["class"] for record in records] == ["sky"] * 3 + ["grass"]
    assert sum(records[0]["probabilities"].values()) == pytest.approx(1)
    done = runner.invoke(app, ["predict", clf, *asked, "--csv"])
    assert done.stdout.splitlines()[0] == "path,class,grass,sky"
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    done = runner.invoke(app, ["predict", clf, str(tmp_path / "broken.jpg"), *asked])
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 4
    assert "broken.jpg cannot be read" in done.stderr
    done = runner.invoke(app, ["export", clf, str(tmp_path / "m.pt2")])
    assert done.exit_code == 0, done.output


def test_a_run_of_another_problem_says_so(tmp_path: Path) -> None:
    config = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
        "solver": {"name": "bome"},
        "steps": 1,
        "log": {"tensorboard": False},
    }
    result = train(config, output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="analytic classifies no images"):
        result.classifier().fit(torch.zeros(2, 1, 16, 16), [0, 1])
