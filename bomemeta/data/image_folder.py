"""A folder of photographs as a few-shot data set: `image_folder`."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bomemeta.data.augmentation import Augmentation, Transform, augmented, named_transform
from bomemeta.data.class_images import (
    ClassRows,
    Draw,
    check_spec,
    check_ways,
    episode_of,
    generator,
)
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.data.image_cache import Duplicates, cache_folder, open_images
from bomemeta.data.image_decoding import Resize
from bomemeta.data.image_files import list_images, shown
from bomemeta.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from bomemeta.errors import ConfigError, DataError
from bomemeta.registry import datasets

# Images that `normalisation: training` measures: enough for three digits.
MEASURED_IMAGES = 2000


class Table(NamedTuple):
    """Images in memory or in a memory map, class after class, and the classes of each split."""

    images: NDArray[np.uint8]  # [n, C, H, W]
    splits: dict[Split, ClassRows]
    digest: str  # of the images' content and of how they are decoded
    notes: tuple[str, ...]


class ImageEpisodes(ABC):
    """Episodes from a table of images. A subclass says where the table comes from."""

    label: ClassVar[str]  # what messages call the data set
    small_classes: Literal["drop", "error"]  # what happens to a class with too few images

    @functools.cached_property
    def table(self) -> Table:
        """The images, read once per process."""
        return self._read()

    @abstractmethod
    def _read(self) -> Table: ...

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]: ...

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """From any image to what the network is given."""
        return self._preprocessing()

    @abstractmethod
    def _preprocessing(self) -> Preprocessing: ...

    @abstractmethod
    def _transform(self) -> Transform | None:
        """The augmentation of training images; None: there is none."""

    @property
    def value_range(self) -> tuple[float, float]:
        """The numbers that 0 and 255 become, over all channels."""
        mean, std = self.preprocessing.mean or (0.0,), self.preprocessing.std or (1.0,)
        pairs = list(zip(mean, std, strict=True))
        return min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)

    @property
    def augments(self) -> bool:
        """Whether a training image differs from episode to episode."""
        return self._transform() is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in sentences for the user."""
        return self.table.notes

    @property
    def digest(self) -> str:
        """A hash of the images' content and of how they are decoded."""
        return self.table.digest

    @property
    def count(self) -> int:
        """Images in the table."""
        return len(self.table.images)

    def prepare(self) -> None:
        """Reads and decodes the images where that has not been done. Raises DataError."""
        _ = self.table

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        """Raises DataError where the split has too few classes that are large enough."""
        self._classes(split, spec)

    def rows(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Draw:
        """Which images the episode of this key has."""
        return self._classes(split, spec).draw(spec, generator(key))

    def class_names(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> list[str]:
        """The names of the classes of the episode of this key."""
        return self._classes(split, spec).names_of(spec, key)

    def class_count(self, split: Split, spec: EpisodeSpec) -> int:
        """How many classes such episodes are drawn from."""
        return len(self._classes(split, spec).count)

    def class_numbers(
        self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """The numbers `[ways]` of the classes of the episode of this key."""
        return self._classes(split, spec).numbers_of(spec, key)

    def images(self, rows: NDArray[np.int64]) -> Tensor:
        """The images of these rows, without augmentation: float32 `[n, C, H, W]`."""
        return self.preprocessing.floats(torch.from_numpy(self.table.images[rows]))

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        """Normalised images `[n, C, H, W]`; those of training are augmented."""
        rng = generator(key)
        draw = self._classes(split, spec).draw(spec, rng)
        rows = np.concatenate([draw.support.ravel(), draw.query.ravel()])
        pixels = torch.from_numpy(self.table.images[rows])
        transform = self._transform() if split == "train" else None
        if transform is not None:
            pixels = augmented(pixels, transform, int(rng.integers(2**62)))
        images = self.preprocessing.floats(pixels)
        return episode_of(images[: draw.support.size], images[draw.support.size :], spec)

    def _classes(self, split: Split, spec: EpisodeSpec) -> ClassRows:
        """The classes of the split with enough images for such an episode."""
        known: dict[tuple[Split, EpisodeSpec], ClassRows] = self.__dict__.setdefault("_large", {})
        if (split, spec) not in known:
            check_spec(self.label, spec)
            rows, wanted = self.table.splits[split], spec.shots + spec.queries
            small = [
                f"{rows.names[int(i)]} ({rows.count[i]})"
                for i in np.flatnonzero(rows.count < wanted)
            ]
            if small and self.small_classes == "error":
                raise DataError(
                    f"{self.label}: {len(small)} classes ({split}) have fewer than the {wanted} images that "
                    f"shots + queries needs: {shown(small)}. Lower problem.queries, problem.test_queries or "
                    "problem.shots, or set data.small_classes: drop"
                )
            if len(rows.count) - len(small) < spec.ways <= len(rows.count):
                raise DataError(
                    f"{self.label}: the {split} split has {len(rows.count) - len(small)} classes with the "
                    f"{wanted} images that shots + queries needs; problem.ways is {spec.ways}. Too small are "
                    f"{shown(small)}: lower problem.ways, problem.shots or the queries"
                )
            of_all = ", ".join(f"{name} {len(of.count)}" for name, of in self.table.splits.items())
            advice = f"lower it, or give each split enough classes with data.split (now {of_all})"
            check_ways(self.label, split, spec, len(rows.count), advice)
            large = np.flatnonzero(rows.count >= wanted)
            known[split, spec] = ClassRows(
                rows.start[large], rows.count[large], [rows.names[int(i)] for i in large]
            )
        return known[split, spec]

    def small_notes(self, split: Split, spec: EpisodeSpec) -> list[str]:
        """A sentence on the classes that are too small for such episodes and are not drawn."""
        rows, wanted = self.table.splits[split], spec.shots + spec.queries
        small = [
            f"{rows.names[int(i)]} ({rows.count[i]})" for i in np.flatnonzero(rows.count < wanted)
        ]
        if not small:
            return []
        return [
            f"{len(small)} classes ({split}) have fewer than the {wanted} images that shots + queries needs "
            f"and are not drawn: {shown(small)}"
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the memory map itself.
        gone = {"table", "_large", "preprocessing"}
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Normalisation(NamedTuple):
    """Per channel, of pixels in [0, 1]."""

    mean: list[float]
    std: list[float]


Shares = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=3)]


@datasets.register("image_folder")
@dataclass(frozen=True)
class ImageFolder(ImageEpisodes):
    """A folder of images: root/CLASS/*.jpg, root/{train,validation,test}/CLASS/*.jpg, or a CSV file
    with the columns path, label and perhaps split (paths from the file's folder).

    Files are decoded once, to `size` x `size` pixels, into a cache that all processes of a machine
    share. Hidden files are not looked at, links are followed, unreadable files are named and left
    out. A relative `root` is looked for here, then in BOMEMETA_DATA.
    """

    label: ClassVar[str] = "image_folder"

    root: str
    size: Annotated[int, Field(ge=8)] = 84
    split: Shares | dict[Split, list[str]] | None = None
    split_seed: Annotated[int, Field(ge=0)] = 0
    channels: Literal[1, 3] = 3
    resize: Resize = "crop"
    normalisation: (
        Literal["none", "imagenet", "training"] | dict[Literal["mean", "std"], list[float]]
    ) = "none"
    augmentation: Augmentation = "none"
    small_classes: Literal["drop", "error"] = "drop"
    duplicates: Duplicates = "drop"
    cache: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", os.fspath(self.root))  # a Path from Python
        if isinstance(self.split, list) and not sum(self.split) > 0:
            raise ConfigError(
                f"split: got {self.split}; wanted three shares of the classes, not all 0"
            )
        given = self.normalisation
        if isinstance(given, dict) and (
            set(given) != {"mean", "std"}
            or any(len(values) != self.channels for values in given.values())
            or min(given["std"], default=0) <= 0
        ):
            raise ConfigError(
                f"normalisation: got {given}; wanted mean and std, each of {self.channels} numbers, std > 0"
            )
        if given == "imagenet" and self.channels != 3:
            raise ConfigError("normalisation: imagenet is of three channels; got channels: 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def _preprocessing(self) -> Preprocessing:
        found = self._normalisation()
        return Preprocessing(
            channels=self.channels,
            height=self.size,
            width=self.size,
            resize=self.resize,
            mean=tuple(found.mean),
            std=tuple(found.std),
        )

    def _normalisation(self) -> Normalisation:
        if isinstance(self.normalisation, dict):
            return Normalisation(**self.normalisation)
        if self.normalisation == "imagenet":
            return Normalisation(list(IMAGENET_MEAN), list(IMAGENET_STD))
        if self.normalisation == "none":
            return Normalisation([], [])
        rows = self.table.splits["train"]
        if not len(rows.start):
            raise DataError("image_folder: normalisation: training, but there is no training class")
        every = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(rows.start, rows.count, strict=True)]
        )
        chosen = every[:: max(len(every) // MEASURED_IMAGES, 1)]
        pixels = self.table.images[chosen].astype(np.float64) / 255
        std = np.maximum(pixels.std((0, 2, 3)), 1 / 255)  # a channel of one value is left as it is
        return Normalisation(pixels.mean((0, 2, 3)).tolist(), std.tolist())

    def _transform(self) -> Transform | None:
        if self.augmentation == "none":
            return None
        return named_transform(self.augmentation, self.size, self.size)

    def _read(self) -> Table:
        root = _found(Path(self.root).expanduser())
        listing = list_images(root, self.split, self.split_seed)
        stored = open_images(
            listing.files,
            root,
            cache_folder(self.cache),
            size=(self.size, self.size),
            channels=self.channels,
            resize=self.resize,
            duplicates=self.duplicates,
        )
        names = list(listing.files)
        number = {name: i for i, name in enumerate(names)}
        start = np.cumsum(stored.counts) - stored.counts
        splits: dict[Split, ClassRows] = {}
        for split, of_split in listing.splits.items():
            chosen = np.array([number[name] for name in of_split], np.int64)
            splits[split] = ClassRows(start[chosen], stored.counts[chosen], tuple(of_split))
        return Table(stored.images, splits, stored.digest, (*listing.notes, *stored.notes))


def _found(root: Path) -> Path:
    """The folder or file, from here or from BOMEMETA_DATA; where neither has it, as it was given."""
    data = os.environ.get("BOMEMETA_DATA")
    if root.is_absolute() or root.exists() or not data:
        return root
    return Path(data).expanduser() / root
