"""CIFAR-10N as features of a network that was trained on ImageNet: data set `cifar10n_features`.

Images of 32 x 32 are enlarged and passed once through EfficientNet-Lite0 (extra `pretrained`). The 1,280 numbers
of each are kept in `file`, from which later runs read.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from bomemeta.data.cifar10n import Cifar10N
from bomemeta.data.labelled import Examples, Part
from bomemeta.errors import DataError
from bomemeta.nets.pretrained import efficientnet_lite0
from bomemeta.registry import datasets

MEAN, DEVIATION = 0.498, 0.502  # that the network was trained with
ROWS = 100  # images at once


@datasets.register("cifar10n_features")
@dataclass(frozen=True, kw_only=True)
class Cifar10NFeatures(Cifar10N):
    """Rows of 1,280 features; labels as in `cifar10n`."""

    features: ClassVar[int] = 1280

    file: str  # .npz; written where it does not exist
    size: int = 96  # pixels of both sides that images are enlarged to

    def examples(self, part: Part) -> Examples:
        stored = super().examples(part)
        return Examples(self._rows[part], stored.labels)

    def picture(self) -> str:
        return "a row is features"

    @functools.cached_property
    def _rows(self) -> dict[Part, torch.Tensor]:
        path = Path(self.file)
        if not path.is_file():
            made = {"train": self._passed("train").numpy(), "test": self._passed("test").numpy()}
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_name(f"{path.stem}.{os.getpid()}.npz")
            np.savez(whole, size=self.size, **made)
            whole.replace(path)
        with np.load(path) as found:
            size = int(found["size"]) if "size" in found else None
            if size != self.size:
                raise DataError(
                    f"{path}: features of images of {size} pixels, data.size is {self.size}; take another data.file, or remove it"
                )
            return {
                "train": torch.from_numpy(found["train"]),
                "test": torch.from_numpy(found["test"]),
            }

    def _passed(self, part: Part) -> torch.Tensor:
        stored = super().examples(part)
        images = stored.rows(torch.arange(len(stored.labels)), torch.float32)
        images = images.reshape(-1, *self.image_shape).sub_(MEAN).div_(DEVIATION)
        network = efficientnet_lite0().eval()
        with torch.inference_mode():
            parts = [
                network(functional.interpolate(rows, size=self.size, mode="bilinear"))
                for rows in images.split(ROWS)
            ]
        return torch.cat(parts)
