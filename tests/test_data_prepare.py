"""`prepare`: conversions on small data sets of torchvision's form, and what happens without a
network.
"""

from __future__ import annotations

import os
import re
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import needs
import numpy as np
import pytest
from PIL import Image

from bomemeta.data import archives, glyphs, prepare
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.errors import DataError
from bomemeta.registry import datasets


@pytest.fixture
def omniglot_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two alphabets and one, two characters each, three drawers: a black square on white paper, at
    the class's own location.
    """
    number = 0
    for part, alphabet in (
        ("background", "Zeta"),
        ("background", "Armenian"),
        ("evaluation", "Beta"),
    ):
        for character in ("character02", "character01"):
            folder = tmp_path / part / alphabet / character
            folder.mkdir(parents=True)
            number += 1
            for drawer in (3, 1, 2):
                paper = np.full((105, 105), 255, np.uint8)
                paper[10 * number : 10 * number + 20, 40:60] = 0
                Image.fromarray(paper).convert("1").save(folder / f"{number:04}_{drawer:02}.png")
    return tmp_path / "background", tmp_path / "evaluation"


def test_omniglot_conversion(omniglot_folders: tuple[Path, Path]) -> None:
    arrays = prepare.omniglot_arrays(*omniglot_folders)
    assert arrays["alphabet_name"].tolist() == ["Armenian", "Zeta", "Beta"]
    assert arrays["alphabet_is_evaluation"].tolist() == [False, False, True]
    assert arrays["class_name"].tolist()[:3] == [
        "Armenian/character01",
        "Armenian/character02",
        "Zeta/character01",
    ]
    assert arrays["class_char_id"].tolist() == [4, 3, 2, 1, 6, 5]
    assert arrays["class_alphabet"].tolist() == [0, 0, 1, 1, 2, 2]
    assert arrays["class_is_evaluation"].tolist() == [False] * 4 + [True] * 2
    assert arrays["class_vinyals_split"].tolist() == [1, 1, 0, 0, 0, 0]
    assert arrays["label"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3
    assert arrays["drawer"].tolist() == [1, 2, 3] * 6
    assert arrays["images"].shape == (18, 28, 28)
    for image, char_id in zip(arrays["images"], np.repeat(arrays["class_char_id"], 3), strict=True):
        row, column = np.unravel_index(int(image.argmax()), image.shape)
        assert image.max() == 255  # ink
        assert abs((row + 0.5) * 105 / 28 - (10 * char_id + 10)) < 10
        assert 40 <= (column + 0.5) * 105 / 28 <= 60
        assert image[0, 0] == 0


def test_converted_omniglot_can_be_drawn_from(
    omniglot_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with mock.patch.dict(
        prepare.ARCHIVES,
        omniglot=("omniglot28.npz", lambda _: prepare.omniglot_arrays(*omniglot_folders)),
    ):
        path = prepare.prepare("omniglot", tmp_path / "new" / "root")
    episode = datasets.get("omniglot")(root=str(path.parent)).episode(
        "validation", EpisodeSpec(5, 1, 2), (0,)
    )
    assert episode.query.shape == (10, 1, 28, 28)
    assert [entry.name for entry in path.parent.iterdir()] == ["omniglot28.npz"]


def test_mnist_conversion() -> None:
    rng = np.random.default_rng(0)
    train, test = (
        SimpleNamespace(data=rng.integers(0, 256, (n, 28, 28)), targets=rng.integers(0, 10, n))
        for n in (30, 10)
    )
    arrays = prepare.mnist_arrays(train, test)
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "x_train": (np.uint8, (30, 28, 28)),
        "y_train": (np.uint8, (30,)),
        "x_test": (np.uint8, (10, 28, 28)),
        "y_test": (np.uint8, (10,)),
    }
    assert (arrays["x_test"] == test.data).all()


def test_cifar10_keeps_the_first_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CIFAR10_PER_CLASS", 2)
    monkeypatch.setattr(prepare, "CIFAR10_TEST", 3)
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    data = SimpleNamespace(data=images, targets=[1, 0, 1, 1, 0, 0, 1, 0])
    arrays = prepare.cifar10_arrays(data, data, ["cat", "dog"])
    assert arrays["train_index"].tolist() == [0, 1, 2, 4]
    assert arrays["y_train"].tolist() == [1, 0, 1, 0]
    assert arrays["x_train"][:, 0, 0, 0].tolist() == [0, 1, 2, 4]
    assert arrays["y_test"].tolist() == [1, 0, 1]


def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    archives.write(tmp_path / "a.npz", {"x": np.arange(3)}, compress=True)
    with (
        mock.patch.object(np, "savez_compressed", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        archives.write(tmp_path / "a.npz", {"x": np.arange(4)}, compress=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
    assert archives.read(tmp_path / "a.npz", ["x"])["x"].tolist() == [0, 1, 2]


def test_an_archive_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mnist.npz").write_bytes(b"mine")
    assert prepare.prepare("mnist", tmp_path) == tmp_path / "mnist.npz"
    assert (tmp_path / "mnist.npz").read_bytes() == b"mine"


@pytest.mark.parametrize("name", [*sorted(prepare.ARCHIVES), "cifar100"])
def test_no_network_says_what_to_do(name: str, tmp_path: Path) -> None:
    failure = urllib.error.URLError("no route")
    with (
        mock.patch("urllib.request.urlopen", side_effect=failure),
        pytest.raises(
            DataError,
            match=f"{name} could not be got into {tmp_path}.*run it where both are, then copy",
        ),
    ):
        prepare.prepare(name, tmp_path)
    assert not list(tmp_path.iterdir())


@needs.learn2learn
def test_learn2learn_download_that_fails_is_a_data_error(tmp_path: Path) -> None:
    failure = ConnectionError("no route")
    with (
        mock.patch("requests.get", side_effect=failure),
        mock.patch("requests.Session.get", side_effect=failure),
    ):
        with pytest.raises(DataError, match=r"learn2learn/cifarfs: .*no route"):
            prepare.prepare("learn2learn/cifarfs", tmp_path)
        with pytest.raises(DataError, match=r"learn2learn/fc100: .*no route"):
            prepare.prepare("learn2learn/fc100", tmp_path, trust_pickles=True)


def test_pickles_need_trust_before_they_are_downloaded(tmp_path: Path) -> None:
    with (
        mock.patch("requests.get", side_effect=AssertionError),
        pytest.raises(DataError, match="can run any code"),
    ):
        prepare.prepare("learn2learn/mini-imagenet", tmp_path)


OURS = [name for name in datasets.names() if datasets.get(name).__module__.startswith("bomemeta.")]


# They need no data, or data that are the user's own.
WITHOUT = {
    "digits", "glyphs", "labelled_array", "image_folder", "regression_arrays", "sinusoid", "installed_texts",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OURS if name not in WITHOUT])
def test_who_has_no_data_is_told_a_command_that_gets_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BOMEMETA_DATA", raising=False)
    with pytest.raises(DataError) as failure:
        datasets.get(name)().prepare()
    (reported,) = re.findall(
        r"`bomemeta data prepare (\S+) --root FOLDER` fills one", str(failure.value)
    )
    assert reported in prepare.names()


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    assert "learn2learn/cifarfs" in prepare.names()
    for name in ("imagenet", "learn2learn/imagenet"):
        with pytest.raises(DataError, match="Known: cifar100, "):
            prepare.prepare(name, tmp_path)


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="folder that can be written"):
        prepare.prepare("mnist", tmp_path / "file")


def test_the_published_split_follows_from_the_rule() -> None:
    folder = os.environ.get("BOMEMETA_DATA")
    if not folder or not (Path(folder) / "omniglot28.npz").is_file():
        pytest.skip(
            "needs omniglot28.npz: run `bomemeta data prepare omniglot --root FOLDER` and set BOMEMETA_DATA=FOLDER"
        )
    arrays = archives.read(Path(folder) / "omniglot28.npz", ["class_name", "class_vinyals_split"])
    assert (
        prepare.vinyals_split(arrays["class_name"].tolist()) == arrays["class_vinyals_split"]
    ).all()


def test_without_a_root_the_environment_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BOMEMETA_DATA", raising=False)
    with pytest.raises(DataError, match="use --root DIR or set BOMEMETA_DATA"):
        prepare.prepare("omniglot", None)
    monkeypatch.setenv("BOMEMETA_CACHE", str(tmp_path))

    def render(self: glyphs.Glyphs) -> None:  # tests/test_data_glyphs.py renders the fonts
        assert self.root is not None
        glyphs.cache_path(Path(self.root)).touch()

    monkeypatch.setattr(glyphs.Glyphs, "prepare", render)
    assert prepare.prepare("glyphs", None).parent == tmp_path
