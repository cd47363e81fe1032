"""CIFAR-10 with the labels that people gave it (CIFAR-10N; Wei et al., "Learning with Noisy Labels
Revisited", ICLR 2022).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from bomemeta.data import archives
from bomemeta.data.image_sets import check_images
from bomemeta.data.labelled import Examples, Part
from bomemeta.errors import DataError
from bomemeta.registry import datasets

# What people gave: by name, the key in the archive.
HUMAN = {
    "worse": "worse_label",
    "aggregate": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
}


@datasets.register("cifar10n")
@dataclass(frozen=True, kw_only=True)
class Cifar10N:
    """8,000 + 1,000 images of CIFAR-10, 3 x 32 x 32, with true labels and five sets of human ones
    (`worse`, `aggregate`, `random1` to `random3`). `root`: the folder that holds `cifar10_subset.npz`
    and `cifar10n_labels.npz`; by default `BOMEMETA_DATA`.
    """

    image_shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    features: ClassVar[int] = 3072
    classes: ClassVar[int] = 10

    root: str | None = None

    def prepare(self) -> None:
        self.examples("train")

    def examples(self, part: Part) -> Examples:
        """Rows are 3,072 numbers, channel by channel."""
        return _images(archives.find("cifar10_subset", "cifar10_subset.npz", self.root))[part]

    def given_labels(self, name: str) -> Tensor:
        """The labels of all training rows that people gave, int64. Raises DataError where there is
        no such set.
        """
        if name not in HUMAN:
            raise DataError(f"cifar10n has no labels {name!r}; it has {', '.join(HUMAN)}")
        path = archives.data_folder("cifar10_subset", self.root) / "cifar10n_labels.npz"
        if not path.is_file():
            raise DataError(
                f"cifar10n: {path} does not exist. It has the labels that CIFAR-10N's authors give (CIFAR-10_human.pt) of the rows of "
                f"cifar10_subset.npz, as int64 arrays {', '.join(HUMAN.values())}; or set problem.labels=own"
            )
        found = archives.read(path, [HUMAN[name]])[HUMAN[name]]
        rows = len(self.examples("train").labels)
        if found.shape != (rows,):
            raise DataError(
                f"{path}: labels {list(found.shape)} for {rows} images of cifar10_subset.npz; the two belong together, row by row"
            )
        if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= self.classes:
            raise DataError(
                f"{path}: {HUMAN[name]} is {found.dtype} from {found.min()} to {found.max()}; wanted whole numbers from 0 to "
                f"{self.classes - 1}"
            )
        return torch.from_numpy(found.astype("int64"))


@functools.cache
def _images(path: Path) -> dict[Part, Examples]:
    arrays = archives.read(path, ["x_train", "y_train", "x_test", "y_test"])
    check_images(arrays, path)
    if arrays["x_train"].shape[1:3] != Cifar10N.image_shape[1:]:
        raise DataError(
            f"{path}: x_train is {list(arrays['x_train'].shape)}; wanted images of 32 x 32"
        )
    for name in ("y_train", "y_test"):
        if arrays[name].min() < 0 or arrays[name].max() >= Cifar10N.classes:
            raise DataError(f"{path}: {name} has labels beyond 0 to {Cifar10N.classes - 1}")
    parts: dict[Part, Examples] = {}
    for part in ("train", "test"):
        images = torch.from_numpy(arrays[f"x_{part}"]).permute(0, 3, 1, 2).flatten(1)
        labels = torch.from_numpy(arrays[f"y_{part}"].astype("int64"))
        parts["train" if part == "train" else "test"] = Examples(images.contiguous(), labels)
    return parts
