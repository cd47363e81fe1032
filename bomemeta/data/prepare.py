"""`bomemeta data prepare NAME`: gets a data set once, on a machine with internet, and writes the
archive that the others read.

Archives hold plain arrays, images as uint8, no pickles. Each conversion is a function of what
torchvision gives, so that it can be tested without a network.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bomemeta.boundary import reason
from bomemeta.data import archives, glyphs, l2l_tasksets, newsgroups, omniglot
from bomemeta.errors import DataError
from bomemeta.registry import datasets

Arrays = dict[str, NDArray[Any]]

CIFAR10_PER_CLASS = (
    800  # a subset of 25 MB: enough for tests and for problems of a few thousand images
)
CIFAR10_TEST = 1000

# Vinyals et al.'s split as Snell et al. published it is, in the order of alphabets and characters
# by name: these five alphabets for validation, everything from the 1,201st character on (from the
# 42nd of Gurmukhi) for test, the rest for training.
VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
VINYALS_FIRST_TEST = 1200


class Labelled(Protocol):
    """What the conversions read of a torchvision data set: all images and all labels, in its order."""

    data: Any
    targets: Any


class CountedRows(Protocol):
    """What the conversion reads of scikit-learn's 20 Newsgroups."""

    data: Any  # scipy CSR matrix of counts
    target: Any
    target_names: Any
    feature_names: Any


def prepare(name: str, root: Path | None, *, trust_pickles: bool = False) -> Path:
    """Gets data set `name` into `root` and returns what was made: the archive, torchvision's
    folder, or `root` for learn2learn's files.

    No `root`: where a run without `data.root` looks, `BOMEMETA_DATA` or, for glyphs, the cache.

    An archive that is there is left as it is (delete it to have it made anew). `trust_pickles` is
    needed for those benchmarks of learn2learn that are pickles, because it loads what it has
    downloaded. Raises DataError where the name is unknown, the download fails or the files cannot
    be written.
    """
    root = _root(name) if root is None else root.expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if name in ARCHIVES:
            file, make = ARCHIVES[name]
            path = root / file
            if not path.exists():
                # Beside the archive, because a machine's own temporary folder may be too small.
                with tempfile.TemporaryDirectory(dir=root, prefix="download-") as downloads:
                    archives.write(path, make(Path(downloads)), compress=True)
            return path
        if name == "cifar100":
            return _cifar100(root)
        if name == "glyphs":
            datasets.get(name)(root=str(root)).prepare()
            if not (rendered := glyphs.cache_path(root)).is_file():
                raise PermissionError(f"{rendered} could not be written")
            return rendered
        if name in names():
            return _learn2learn(name, root, trust_pickles)
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DataError(
            f"{name} could not be got into {root}: {reason(error)}. This step needs internet and a folder that can "
            f"be written: run it where both are, then copy the folder here and set data.root or BOMEMETA_DATA"
        ) from error
    raise DataError(f"{name!r} is nothing that can be prepared. Known: {', '.join(names())}")


def _root(name: str) -> Path:
    if name == "glyphs":
        return glyphs.cache_folder(None)
    if not os.environ.get("BOMEMETA_DATA"):
        raise DataError(
            f"{name}: no folder is given to put it in; use --root DIR or set BOMEMETA_DATA"
        )
    return Path(os.environ["BOMEMETA_DATA"]).expanduser()


def names() -> list[str]:
    """All names that `prepare` knows, sorted."""
    return sorted(
        {
            *ARCHIVES,
            "cifar100",
            "glyphs",
            *(name for name in datasets.names() if name.startswith("learn2learn/")),
        }
    )


def _cifar100(root: Path) -> Path:
    """Torchvision's own folder: its files are what `data.dataset: cifar100` reads."""
    import torchvision

    folder: str = torchvision.datasets.CIFAR100(str(root), download=True).base_folder
    return root / folder


def _learn2learn(name: str, root: Path, trust_pickles: bool) -> Path:
    benchmark = datasets.get(name)
    if not issubclass(benchmark, l2l_tasksets.LearnToLearnEpisodes):
        raise DataError(f"{name} is not one of learn2learn's benchmarks")
    if benchmark.pickled and not trust_pickles:
        raise DataError(
            l2l_tasksets.untrusted(name, root)
            + ". If you trust learn2learn's sources, say so: --trust-pickles"
        )
    l2l_tasksets.load(benchmark.benchmark, root)
    return root


def omniglot_arrays(background: Path, evaluation: Path) -> Arrays:
    """Omniglot's two folders, `alphabet/characterNN/IIII_DD.png` with black ink, as the arrays of
    `omniglot28.npz`.

    Rows are ordered by alphabet (background first), character and drawer (DD), each by name. Images
    are reduced from 105x105 to 28x28 by Lanczos, as learn2learn does, with ink 255.
    """
    from PIL import Image

    size = (omniglot.IMAGE_PX, omniglot.IMAGE_PX)
    images: list[NDArray[np.uint8]] = []
    label: list[int] = []
    drawer: list[int] = []
    class_name: list[str] = []
    class_alphabet: list[int] = []
    class_char_id: list[int] = []
    class_is_evaluation: list[bool] = []
    alphabets = [(folder, False) for folder in _folders(background)] + [
        (folder, True) for folder in _folders(evaluation)
    ]
    for number, (alphabet, is_evaluation) in enumerate(alphabets):
        for character in _folders(alphabet):
            files = sorted(character.glob("*.png"))
            for file in files:
                with Image.open(file) as image:
                    images.append(
                        255 - np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS))
                    )
                label.append(len(class_name))
                drawer.append(int(file.stem.split("_")[1]))
            class_name.append(f"{alphabet.name}/{character.name}")
            class_alphabet.append(number)
            class_char_id.append(int(files[0].stem.split("_")[0]))
            class_is_evaluation.append(is_evaluation)
    return {
        "images": np.stack(images),
        "label": np.array(label, np.int16),
        "drawer": np.array(drawer, np.uint8),
        "class_name": np.array(class_name),
        "class_alphabet": np.array(class_alphabet, np.uint8),
        "class_char_id": np.array(class_char_id, np.int16),
        "class_is_evaluation": np.array(class_is_evaluation),
        "class_vinyals_split": vinyals_split(class_name),
        "alphabet_name": np.array([alphabet.name for alphabet, _ in alphabets]),
        "alphabet_is_evaluation": np.array([is_evaluation for _, is_evaluation in alphabets]),
    }


def vinyals_split(class_names: list[str]) -> NDArray[np.int8]:
    """0 train, 1 validation, 2 test for each `alphabet/characterNN` of all of Omniglot, background
    first, each part by name.
    """
    split = np.zeros(len(class_names), np.int8)
    split[[name.split("/")[0] in VINYALS_VALIDATION for name in class_names]] = (
        omniglot.SPLIT_NUMBER["validation"]
    )
    split[VINYALS_FIRST_TEST:] = omniglot.SPLIT_NUMBER["test"]
    return split


def mnist_arrays(train: Labelled, test: Labelled) -> Arrays:
    """MNIST or Fashion-MNIST in the original order: `x_*` uint8 [n, 28, 28], `y_*` uint8 [n]."""
    return {
        "x_train": np.asarray(train.data, np.uint8),
        "y_train": np.asarray(train.targets, np.uint8),
        "x_test": np.asarray(test.data, np.uint8),
        "y_test": np.asarray(test.targets, np.uint8),
    }


def cifar10_arrays(train: Labelled, test: Labelled, label_names: list[str]) -> Arrays:
    """The first 800 training images of each class, in the original order, and the first 1,000 test
    images: [n, 32, 32, 3].
    """
    targets = np.asarray(train.targets)
    firsts = [
        np.flatnonzero(targets == label)[:CIFAR10_PER_CLASS] for label in range(len(label_names))
    ]
    index = np.sort(np.concatenate(firsts))
    return {
        "x_train": np.asarray(train.data, np.uint8)[index],
        "y_train": targets[index].astype(np.uint8),
        "train_index": index.astype(np.int32),
        "x_test": np.asarray(test.data, np.uint8)[:CIFAR10_TEST],
        "y_test": np.asarray(test.targets, np.uint8)[:CIFAR10_TEST],
        "label_name": np.array(label_names),
    }


def _folders(parent: Path) -> list[Path]:
    return sorted(entry for entry in parent.iterdir() if entry.is_dir())


def _omniglot(downloads: Path) -> Arrays:
    from torchvision.datasets import Omniglot

    folders = [
        Path(Omniglot(str(downloads), background, download=True).target_folder)
        for background in (True, False)
    ]
    return omniglot_arrays(*folders)


def _mnist(downloads: Path) -> Arrays:
    from torchvision.datasets import MNIST

    return mnist_arrays(*(MNIST(str(downloads), train, download=True) for train in (True, False)))


def _fashion_mnist(downloads: Path) -> Arrays:
    from torchvision.datasets import FashionMNIST

    return mnist_arrays(
        *(FashionMNIST(str(downloads), train, download=True) for train in (True, False))
    )


def _cifar10(downloads: Path) -> Arrays:
    # torchvision's CIFAR-10 files are pickles too: it loads them only after their MD5 sums match
    # those in its source.
    from torchvision.datasets import CIFAR10

    train, test = (CIFAR10(str(downloads), train, download=True) for train in (True, False))
    return cifar10_arrays(train, test, list(train.classes))


def newsgroups_arrays(train: CountedRows, test: CountedRows) -> Arrays:
    """20 Newsgroups as scikit-learn counts it, with `normalize=False`: CSR arrays of each part,
    labels, the vocabulary one word a line.

    scikit-learn shuffles the posts and leaves a post's columns unordered; here rows are sorted by
    class and their columns rise.
    """
    arrays: Arrays = {}
    for part, bunch in (("train", train), ("test", test)):
        start, column = np.asarray(bunch.data.indptr, np.int64), np.asarray(bunch.data.indices)
        rows = np.argsort(bunch.target, kind="stable")
        entry = np.concatenate(
            [start[row] + np.argsort(column[start[row] : start[row + 1]]) for row in rows]
        )
        arrays[f"{part}_indptr"] = np.concatenate([[0], np.cumsum(np.diff(start)[rows])]).astype(
            np.int32
        )
        arrays[f"{part}_indices"] = column[entry].astype(np.int32)
        arrays[f"{part}_counts"] = np.asarray(bunch.data.data)[entry].astype(np.uint16)
        arrays[f"y_{part}"] = np.asarray(bunch.target)[rows].astype(np.uint8)
    arrays["label_name"] = np.array(train.target_names)
    arrays["vocabulary_utf8"] = np.frombuffer("\n".join(train.feature_names).encode(), np.uint8)
    return arrays


def _twenty_newsgroups(downloads: Path) -> Arrays:
    from sklearn.datasets import fetch_20newsgroups_vectorized

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it tries once more; what fails is said by `prepare`
        parts = [
            fetch_20newsgroups_vectorized(
                subset=part, normalize=False, data_home=str(downloads), n_retries=1
            )
            for part in newsgroups.PARTS
        ]
    return newsgroups_arrays(*parts)


ARCHIVES: dict[str, tuple[str, Callable[[Path], Arrays]]] = {
    "omniglot": (omniglot.FILE, _omniglot),
    "mnist": ("mnist.npz", _mnist),
    "fashion_mnist": ("fashion_mnist.npz", _fashion_mnist),
    "cifar10_subset": ("cifar10_subset.npz", _cifar10),
    "twenty_newsgroups": (newsgroups.FILE, _twenty_newsgroups),
}
