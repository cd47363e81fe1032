"""Features of a frozen network, computed once per image and kept on the disk.

FOLDER/features/KEY/features.npy      [n, d], row by row those of the data set's images
FOLDER/features/KEY.STEP/START.npy    a run of rows, until all are there: an interrupted run resumes here
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
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
from bomemeta.heartbeat import EVERY_S, FIRST_S, say

VERSION = 1
IMAGES_PER_PASS = 32
IMAGES_PER_FILE = 256  # about, until all are there: what an interruption costs


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
    step = images_per_pass or IMAGES_PER_PASS
    if not here.is_dir():
        with locked(folder / f"{key}.lock"):
            if not here.is_dir():
                kept = folder / f"{key}.{step}"  # other passes may round otherwise
                table = _encoded(dataset, encode, step, dtype, kept)
                write_folder(here, lambda part: np.save(part / "features.npy", table))
                shutil.rmtree(kept, ignore_errors=True)
    with refusing(
        lambda why: DataError(f"the cache {here} is damaged ({why}). Delete it: it is made again")
    ):
        found: NDArray[Any] = np.load(here / "features.npy", mmap_mode="r", allow_pickle=False)
        if found.ndim != 2 or len(found) != dataset.count:
            raise ValueError(f"features {list(found.shape)} of {dataset.count} images")
        return found
    raise AssertionError("unreachable")


def _encoded(
    dataset: Rows,
    encode: Callable[[Tensor], Tensor],
    step: int,
    dtype: torch.dtype,
    kept: Path,
) -> NDArray[Any]:
    """All features, those in the folder `kept` as they are. The passes are the same wherever an earlier
    process stopped, and so are the bits.
    """
    count, rows_per_file = dataset.count, step * max(IMAGES_PER_FILE // step, 1)
    files: list[NDArray[Any]] = []
    began, done, due = time.monotonic(), 0, FIRST_S
    for start in range(0, count, rows_per_file):
        stop = min(start + rows_per_file, count)
        found = _kept(kept / f"{start}.npy", stop - start)
        if found is None:
            passes = []
            for first in range(start, stop, step):
                rows = np.arange(first, min(first + step, stop))
                with torch.no_grad():
                    passes.append(encode(dataset.images(rows).to(dtype)))
                done += len(rows)
                seconds, there = time.monotonic() - began, int(rows[-1]) + 1
                if seconds >= due and there < count:
                    left = seconds / done * (count - there)
                    say(
                        f"encoding every image once, for this run and later ones: {there:,} of {count:,}, "
                        f"about {left:.0f} s left"
                    )
                    due = seconds + EVERY_S
            found = torch.cat(passes).numpy()
            _keep(kept / f"{start}.npy", found)
        files.append(found)
    return np.concatenate(files)


def _kept(file: Path, rows: int) -> NDArray[Any] | None:
    """What an interrupted process left; None where that is nothing whole."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        found: NDArray[Any] = np.load(file, allow_pickle=False)
        if found.ndim == 2 and len(found) == rows:
            return found
    return None


def _keep(file: Path, features: NDArray[Any]) -> None:
    # Best effort: without room for it an interrupted run begins anew.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.save(part, features)
        os.replace(part.name, file)
