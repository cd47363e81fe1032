"""Archives of the named data sets that hold something else: every one says what is wrong, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bomemeta
from bomemeta.data import feature_cache, glyphs
from bomemeta.data.cifar10n import Cifar10N
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.data.feature_cache import frozen_features
from bomemeta.data.image_sets import Cifar10Subset, Cifar100
from bomemeta.data.newsgroups import TwentyNewsgroups
from bomemeta.data.omniglot import Omniglot
from bomemeta.errors import BomemetaError, ConfigError, DataError
from bomemeta.heartbeat import hearing

IMAGES, LABELS = np.zeros((6, 32, 32, 3), np.uint8), np.arange(6) % 3
CIFAR = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}
HUMAN = dict.fromkeys(
    ("worse_label", "aggre_label", "random_label1", "random_label2", "random_label3"), LABELS
)
OMNIGLOT = {
    "images": np.zeros((4, 28, 28), np.uint8), "label": np.array([0, 0, 1, 1]), "class_name": np.array(["a", "b"]),
    "class_vinyals_split": np.array([0, 1]),
}  # fmt: skip
NEWS: dict[str, Any] = {
    f"{part}_{name}": array
    for part in ("train", "test")
    for name, array in (
        ("indptr", np.array([0, 1, 2])), ("indices", np.array([0, 1])), ("counts", np.array([1, 1])),
    )
} | {
    "y_train": np.array([0, 1]), "y_test": np.array([0, 1]), "label_name": np.array(["a", "b"]),
    "vocabulary_utf8": np.frombuffer(b"x\ny", np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("source", [Cifar10Subset, Cifar10N])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": IMAGES[0]}, r"x_train is uint8 \[32, 32, 3\]; wanted uint8 \[6, H, W, 3\]"),
        ({"x_test": IMAGES[:, :16]}, r"x_test is uint8 \[6, 16, 32, 3\]"),
        ({"x_train": IMAGES.astype(float)}, "x_train is float64"),
        ({"y_test": LABELS[:2]}, r"x_test is uint8 \[6, 32, 32, 3\]; wanted uint8 \[2, H, W, 3\]"),
        ({"y_train": LABELS.astype("U3")}, r"y_train is <U3 \[6\]; wanted whole numbers"),
    ],
    ids=range(5),
)
def test_cifar(source: Any, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_subset.npz", **{**CIFAR, **change})
    with pytest.raises(DataError, match=rf"cifar10_subset.npz: {message}"):
        source(root=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    ("human", "message"),
    [(LABELS[:2], r"labels \[2\] for 6 images"), (LABELS + 9, "from 9 to 11; wanted whole numbers from 0 to 9"),
     (LABELS * 1.5, "is float64 from 0.0 to 3.0")], ids=range(3),
)  # fmt: skip
def test_human_labels(human: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10_subset.npz", **CIFAR)
    np.savez(tmp_path / "cifar10n_labels.npz", **{**HUMAN, "worse_label": human})
    with pytest.raises(DataError, match=message):
        Cifar10N(root=str(tmp_path)).given_labels("worse")


@pytest.mark.parametrize(
    "change",
    [
        {"label": np.array([0, 0, 1, 2**40])}, {"label": np.array([0.0, 0, 1, 1])}, {"label": np.array([[0, 0, 1, 1]])},
        {"label": np.array([1, 1, 0, 0])}, {"class_name": np.array("a")}, {"class_vinyals_split": np.array([0, 9])},
        {"images": np.zeros((4, 28, 28))}, {"label": np.array([0, 0, 255, 1], np.uint8)},
    ], ids=range(8),
)  # fmt: skip
def test_omniglot(change: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "omniglot28.npz", **{**OMNIGLOT, **change})
    with pytest.raises(
        DataError, match=r"omniglot28.npz: wanted uint8 images .* data prepare omniglot"
    ):
        Omniglot(root=str(tmp_path)).prepare()


def test_shuffled_characters_are_in_one_split_each_and_the_same_for_everyone(
    tmp_path: Path,
) -> None:
    file, names = tmp_path / "omniglot28.npz", np.array([f"A/{c}" for c in range(1623)])
    np.savez(
        file, images=np.zeros((3246, 28, 28), np.uint8), label=np.arange(3246) // 2,
        class_name=names, class_vinyals_split=np.repeat([0, 1, 2], [1028, 172, 423]),
    )  # fmt: skip
    of_split = {
        split: Omniglot(root=str(tmp_path), characters="shuffled", rotations=False).class_names(
            split, EpisodeSpec(ways, 1, 1), (0,)
        )
        for split, ways in (("train", 1100), ("validation", 100), ("test", 423))
    }
    assert sorted(name for names in of_split.values() for name in names) == sorted(names)
    assert len(set(of_split["test"]) & set(names[:1028])) > 100
    # The seed is the data's: two people's test characters are the same.
    assert sorted(of_split["validation"])[:3] == ["A/1033", "A/1041", "A/107"]


def test_shuffling_another_number_of_characters_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "omniglot28.npz", **OMNIGLOT)
    with pytest.raises(DataError, match="shuffled splits Omniglot's 1,623 characters and got 2"):
        Omniglot(root=str(tmp_path), characters="shuffled").prepare()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_name": np.array("a")}, r"wanted label_name \[classes\].* got \[\]"),
        ({"vocabulary_utf8": np.array(["x", "y"])}, r"got \[2\] and <U1 \[2\]"),
        ({"train_indices": np.array([0, 99])}, "part train: wanted columns below 2"),
        ({"y_test": np.array([0, 7])}, "part test: wanted labels below 2"),
    ],
    ids=range(4),
)
def test_newsgroups(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "twenty_newsgroups_counts.npz", **{**NEWS, **change})
    with pytest.raises(DataError, match=rf"twenty_newsgroups_counts.npz.*{message}"):
        TwentyNewsgroups(root=str(tmp_path)).prepare()


def test_cifar100_of_junk(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"junk")
    with pytest.raises(DataError, match="torchvision finds no whole CIFAR-100"):
        Cifar100(root=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    "change", [{"count": np.array([3])}, {"images": np.zeros((2, 32, 32))}, {"split": np.array([5])}], ids=range(3)
)  # fmt: skip
def test_glyphs_that_were_not_rendered_here_are_rendered(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = {
        "images": np.zeros((2, 32, 32), np.uint8), "count": np.array([2]), "code_point": np.array([65]), "split": np.array([0]),
    }  # fmt: skip
    np.savez(glyphs.cache_path(tmp_path), **{**sound, **change})
    monkeypatch.setattr(glyphs, "render", lambda fonts: sound)
    found = glyphs._glyphs(tmp_path)
    assert found.images.shape == (2, 32, 32)
    with np.load(glyphs.cache_path(tmp_path)) as kept:
        assert kept["count"].tolist() == [2]


def test_features_that_are_damaged_are_named(tmp_path: Path) -> None:
    class Rows:
        digest, augments, count, cache, image_shape = "x", False, 3, str(tmp_path), (1, 4, 4)

        def images(self, rows: Any) -> Any:
            return torch.ones(len(rows), 4)

    def features() -> Any:
        return frozen_features(Rows(), lambda images: images, "w", None, torch.float32)  # type: ignore[arg-type]

    assert features().shape == (3, 4)
    (file,) = tmp_path.glob("features/*/features.npy")
    for content in (b"", b"junk", file.read_bytes()[:-8]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"the cache .* is damaged .*Delete it"):
            features()
    np.save(file, np.ones((2, 4), np.float32))
    with pytest.raises(DataError, match=r"features \[2, 4\] of 3 images"):
        features()


def test_an_interrupted_encoding_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "IMAGES_PER_FILE", 14)
    monkeypatch.setattr(feature_cache, "FIRST_S", 0.0)
    seen: list[int] = []
    heard: list[str] = []

    def features(cache: str, stop_after: int = 60) -> Any:
        class Rows:
            digest, augments, count, image_shape = "x", False, 60, (1, 4, 4)

            def images(self, rows: Any) -> Any:
                return torch.from_numpy(rows)[:, None] + torch.arange(5)

        def encode(images: torch.Tensor) -> torch.Tensor:
            if sum(seen) >= stop_after:
                raise KeyboardInterrupt
            seen.append(len(images))
            return images.sin()

        rows = Rows()
        rows.cache = str(tmp_path / cache)  # type: ignore[attr-defined]
        seen.clear()
        with hearing(heard.append):
            return np.array(frozen_features(rows, encode, "w", 7, torch.float32))  # type: ignore[arg-type]

    whole = features("undisturbed")
    assert sum(seen) == 60
    first = "encoding every image once, for this run and later ones: 7 of 60, about "
    assert heard[0].startswith(first)
    with pytest.raises(KeyboardInterrupt):
        features("stopped", stop_after=35)  # two files of 14 are whole, and half a file is lost
    one, other = sorted((tmp_path / "stopped").glob("features/*.7/*.npy"))
    assert [one.name, other.name] == ["0.npy", "14.npy"]
    other.write_bytes(other.read_bytes()[:-3])  # the power went
    np.testing.assert_array_equal(features("stopped"), whole)
    assert sum(seen) == 60 - 14
    assert [*(tmp_path / "stopped").glob("features/*.7")] == []
    features("stopped")
    assert seen == []


class Failing:
    features = 3
    classes = 2
    image_shape = (1, 2, 2)

    def prepare(self) -> None:
        raise KeyError("no such column")

    def examples(self, part: str) -> Any: ...


def test_what_a_data_set_raises_is_said_with_its_line() -> None:
    settings = {"solver": {"name": "bome", "inner_steps": 1}, "steps": 1}
    problem = {"name": "hyper_cleaning", "train": 2, "validation": 2, "selection": 2}
    with pytest.raises(BomemetaError, match=r"Failing: prepare\(\) raised KeyError: .*test_data_files.py:\d+"):  # fmt: skip
        bomemeta.train({**settings, "problem": problem}, data=Failing())


def test_a_cache_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMEMETA_CACHE", "~nosuchuser")
    with pytest.raises(ConfigError, match=r"BOMEMETA_CACHE: got '~nosuchuser'"):
        glyphs.cache_folder(None)
