"""The auxiliary task of few-shot classification, by a plain reading of its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import bomemeta
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.data.glyphs import Glyphs, _glyphs, cache_folder
from bomemeta.errors import ConfigError, DataError
from bomemeta.problems import few_shot_auxiliary as auxiliary
from bomemeta.problems.few_shot import FewShot

SMALL: dict[str, Any] = {"ways": 3, "queries": 2, "shots": 2, "width": 4}


def made(**keys: Any) -> tuple[FewShot, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    problem = FewShot(**{**SMALL, **keys})
    problem.attach(seed=0, dtype=torch.float64, data=Glyphs())
    x = problem.init_upper(torch.Generator().manual_seed(1))
    return problem, x, problem.load(range(4), 0, "train")


def by_hand(x: dict[str, torch.Tensor], z: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """A of one episode: one image and one class at a time."""
    losses = []
    for image, label in zip(z, labels, strict=True):
        cosines = torch.stack(
            [functional.cosine_similarity(image, w, 0) for w in x["auxiliary.vectors"]]
        )
        logits = x["auxiliary.log_scale"].exp() * cosines
        target = torch.full_like(logits, auxiliary.SMOOTHING / len(logits))
        target[label] += 1 - auxiliary.SMOOTHING
        losses.append(-(target * logits.log_softmax(0)).sum())
    return torch.stack(losses).mean()


def test_f_is_the_queries_loss_and_the_weighted_mean_over_all_images() -> None:
    plain, _, batch = made()
    problem, x, with_classes = made(auxiliary_weight=0.7)
    for name in batch:
        assert torch.equal(batch[name], with_classes[name])
    glyphs = Glyphs()
    spec = problem.spec("train")
    for task in range(4):
        one = {name: rows[task] for name, rows in with_classes.items()}
        key = (problem.seed, 0, task)
        names = glyphs.class_names("train", spec, key)
        every = glyphs_classes(glyphs)
        numbers = [every.index(name) for name in names]
        assert one["classes"].tolist() == numbers
        encoded = problem.encode(x, one)
        images = torch.cat([one["support"], one["query"]])
        z = problem.network.features(x, images)
        labels = list(np.repeat(numbers, 2)) * 2  # two shots and two queries of each
        y = problem.init_lower(encoded, one)
        own = {name: rows for name, rows in one.items() if name != "classes"}
        expected = plain.upper_loss(plain.encode(x, own), y, own) + 0.7 * by_hand(x, z, labels)
        torch.testing.assert_close(problem.upper_loss(encoded, y, one), expected)
        # g does not see it.
        torch.testing.assert_close(
            problem.lower_loss(encoded, y, one), plain.lower_loss(plain.encode(x, own), y, own)
        )


def glyphs_classes(glyphs: Glyphs) -> list[str]:
    return list(_glyphs(cache_folder(glyphs.root)).splits["train"].names)


@pytest.mark.parametrize("head", ["prototype", "ridge", "cosine"])
def test_the_gradient_in_x_is_the_sum_of_both_gradients(head: str) -> None:
    plain, _, batch = made(head=head)
    problem, x, with_classes = made(head=head, auxiliary_weight=0.7)
    assert set(x) - set(plain.init_upper(torch.Generator().manual_seed(1))) == {
        "auxiliary.vectors",
        "auxiliary.log_scale",
    }
    oracle = LocalOracle(problem, x, with_classes, "loop")
    start = oracle.init_lower()
    found = oracle.total(Term("upper", start)).upper
    own = {name: tensor for name, tensor in x.items() if not name.startswith("auxiliary.")}
    without = LocalOracle(plain, own, batch, "loop").total(Term("upper", start)).upper
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    for task in range(4):
        one = {name: rows[task] for name, rows in with_classes.items()}
        (0.7 * problem.encode(leaves, one)[auxiliary.LOSS]).backward()
    for name, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(found[name], grad + without.get(name, 0))


def test_other_splits_have_no_such_term() -> None:
    problem, x, _ = made(auxiliary_weight=0.7)
    for split in ("validation", "test"):
        batch = problem.load(range(2), 0, split)
        assert "classes" not in batch
        one = {name: rows[0] for name, rows in batch.items()}
        assert auxiliary.LOSS not in problem.encode(x, one)


class Unnumbered:
    """Glyphs by another road: without numbers, or with wrong ones."""

    image_shape = (1, 28, 28)

    def __init__(self, numbers: list[int] | None) -> None:
        self._glyphs, self._numbers = Glyphs(), numbers
        if numbers is not None:
            self.class_count = lambda split, spec: 50
            self.class_numbers = lambda split, spec, key: np.array(numbers)

    def prepare(self) -> None:
        self._glyphs.prepare()

    def check(self, *asked: Any) -> None:
        self._glyphs.check(*asked)

    def episode(self, *asked: Any) -> Any:
        return self._glyphs.episode(*asked)


def test_data_that_does_not_number_its_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unnumbered does not number its classes"):
        FewShot(**SMALL, auxiliary_weight=1.0).attach(
            seed=0, dtype=torch.float64, data=Unnumbered(None)
        )
    for wrong in ([0, 1, 1], [0, 1, 50], [-1, 0, 1], [0, 1]):
        problem = FewShot(**SMALL, auxiliary_weight=1.0)
        problem.attach(seed=0, dtype=torch.float64, data=Unnumbered(wrong))
        with pytest.raises(DataError, match=r"episode 3: class_numbers\(\) gave .* 3 different"):
            problem.load([3], 0, "train")
    with pytest.raises(
        ConfigError, match="trainable: none, and head prototype has nothing to learn"
    ):
        made(auxiliary_weight=1.0, trainable="none")  # but the vectors, which no test sees
    with pytest.raises(ConfigError, match="auxiliary_weight: belongs to form head"):
        FewShot(form="network", auxiliary_weight=1.0)


def test_a_run_learns_the_vectors_and_its_classifier_leaves_them_out(tmp_path: Any) -> None:
    result = bomemeta.train(
        "quickstart",
        ["steps=3", "workers=0", "problem.auxiliary_weight=1", "evaluation.episodes=5",
         f"output_dir={tmp_path / 'run'}"],
    )  # fmt: skip
    assert "auxiliary.vectors" in result.upper
    classifier = result.classifier()
    assert "auxiliary.vectors" not in classifier.model.upper
    data = Glyphs()
    episode = data.episode("test", FewShot(**SMALL).spec("test"), (0, 2, 0))
    classifier.fit(episode.support, episode.support_labels.numpy())
    predicted = classifier.predict(episode.query)
    saved = classifier.save(tmp_path / "saved")
    again = bomemeta.load_classifier(saved).predict(episode.query)
    assert (predicted == again).all()
    file = classifier.export(tmp_path / "model.pt2")
    logits, _ = torch.export.load(file).module()(episode.query)
    assert (logits.argmax(1).numpy() == predicted).all()
