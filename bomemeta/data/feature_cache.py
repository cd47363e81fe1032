"""Features of a frozen network, computed once per image and kept on the disk.

FOLDER/features/KEY/features.npy    [n, d], row by row those of the data set's images
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.boundary import refusing
from bomemeta.data.class_images import Draw
from bomemeta.data.episodes import EpisodeSpec, Split
from bomemeta.data.image_cache import cache_folder, locked, write_folder
from bomemeta.data.preprocessing import preprocessing_of
from bomemeta.errors import DataError

VERSION = 1
IMAGES_PER_PASS = 32


class Rows(Protocol):
    """A data set whose episodes are rows of a table of images that does not change."""

    digest: str  # of all images
    augments: bool  # whether `episode` changes the images of training at random

    def rows(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Draw: ...

    def images(self, rows: NDArray[np.int64]) -> Tensor: ...

    @property
    def count(self) -> int: ...


def has_rows(dataset: Any) -> bool:
    """Whether features may be computed once per image."""
    return all(hasattr(dataset, name) for name in ("rows", "images", "digest", "count")) and not (
        dataset.augments
    )


def frozen_features(
    dataset: Rows,
    encode: Callable[[Tensor], Tensor],
    weights: str,
    images_per_pass: int | None,
    dtype: torch.dtype,
) -> NDArray[Any]:
    """`encode` of every image of the data set, `[n, d]`, from the cache where it is there. `weights`
    is a hash of the network.
    """
    how = [VERSION, weights, dataset.digest, preprocessing_of(dataset).to_dict(), str(dtype)]
    key = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
    folder = cache_folder(getattr(dataset, "cache", None)) / "features"
    here = folder / key
    if not here.is_dir():
        with locked(folder / f"{key}.lock"):
            if not here.is_dir():
                write_folder(
                    here, lambda part: _write(part, dataset, encode, images_per_pass, dtype)
                )
    with refusing(
        lambda why: DataError(f"the cache {here} is damaged ({why}). Delete it: it is made again")
    ):
        found: NDArray[Any] = np.load(here / "features.npy", mmap_mode="r", allow_pickle=False)
        if found.ndim != 2 or len(found) != dataset.count:
            raise ValueError(f"features {list(found.shape)} of {dataset.count} images")
        return found
    raise AssertionError("unreachable")


def _write(
    part: Path,
    dataset: Rows,
    encode: Callable[[Tensor], Tensor],
    images_per_pass: int | None,
    dtype: torch.dtype,
) -> None:
    step = images_per_pass or IMAGES_PER_PASS
    found = []
    with torch.no_grad():
        for start in range(0, dataset.count, step):
            rows = np.arange(start, min(start + step, dataset.count))
            found.append(encode(dataset.images(rows).to(dtype)))
    np.save(part / "features.npy", torch.cat(found).numpy())
