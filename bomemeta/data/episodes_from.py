"""Episodes from any map-style data set of (image, label): torchvision's, Hugging Face's, a user's."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from bomemeta.boundary import refusing
from bomemeta.data.augmentation import Transform
from bomemeta.data.class_images import ClassRows
from bomemeta.data.episodes import Split
from bomemeta.data.image_decoding import Resize, UnreadableImage, pillow_image, pixels_of
from bomemeta.data.image_files import DEFAULT_SHARES, SPLITS, drawn_splits, shown
from bomemeta.data.image_folder import ImageEpisodes, Table
from bomemeta.data.preprocessing import Preprocessing
from bomemeta.errors import ConfigError, DataError
from bomemeta.limits import available_memory, size_text


@runtime_checkable
class MapStyle(Protocol):
    """What `torch.utils.data.Dataset` promises: items by number, and how many there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class EpisodesFrom(ImageEpisodes):
    """Few-shot episodes from `dataset`, whose items are pairs (image, label) or mappings with the
    entries "image" (or "img") and "label".

    An image is a Pillow image, an array `[H, W]` or `[H, W, C]`, or a tensor `[C, H, W]`; uint8, or
    floats in [0, 1]. Labels are of any hashable kind. Every item is asked for once, and its image
    kept as uint8 `[channels, size, size]`: leave random transforms to `augmentation`.

    `split`: three shares of the classes drawn with `split_seed`, or the labels of each split.
    `augmentation`: a function of one uint8 image `[C, H, W]`, as torchvision.transforms.v2 has them,
    for training images; it must draw from torch's global generator alone, which follows from the
    episode's key.
    """

    label: ClassVar[str] = "EpisodesFrom"

    dataset: MapStyle
    size: int = 84
    split: Sequence[float] | Mapping[Split, Sequence[Hashable]] | None = None
    split_seed: int = 0
    channels: int = 3
    resize: Resize = "crop"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: Transform | None = None
    small_classes: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        shares = self.split if isinstance(self.split, Sequence) else [1.0, 0, 0]
        checks = (
            ("size", self.size, "a whole number >= 1", type(self.size) is int and self.size >= 1),
            ("channels", self.channels, "1 or 3", self.channels in (1, 3)),
            ("resize", self.resize, "crop, stretch or pad", self.resize in get_args(Resize)),
            ("small_classes", self.small_classes, "drop or error", self.small_classes in ("drop", "error")),
            ("split_seed", self.split_seed, "a whole number >= 0", type(self.split_seed) is int and self.split_seed >= 0),
            ("split", self.split, "three shares >= 0, not all 0, or labels under train, validation and test",
             isinstance(self.split, Mapping | None) or (_numbers(shares, 3, 0) and sum(shares) > 0)),
            ("augmentation", self.augmentation, "a function of an image", self.augmentation is None or callable(self.augmentation)),
            ("mean and std", (self.mean, self.std), f"none, or {self.channels} numbers each, std > 0",
             not (len(self.mean) or len(self.std)) or (
                 _numbers(self.mean, self.channels) and _numbers(self.std, self.channels, 0) and min(self.std) > 0)),
        )  # fmt: skip
        for name, got, wanted, right in checks:
            if not right:
                raise ConfigError(f"EpisodesFrom: {name}: got {got!r}; wanted {wanted}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def _preprocessing(self) -> Preprocessing:
        return Preprocessing(
            channels=self.channels,
            height=self.size,
            width=self.size,
            resize=self.resize,
            mean=tuple(self.mean),
            std=tuple(self.std),
        )

    def _transform(self) -> Transform | None:
        return self.augmentation

    def _read(self) -> Table:
        with refusing(lambda why: DataError(f"EpisodesFrom: the data set's length: {why}")):
            count = len(self.dataset)
        if count == 0:
            raise DataError("EpisodesFrom: the data set is empty")
        wanted, memory = count * math.prod(self.image_shape), available_memory()
        if memory is not None and wanted > memory:
            raise DataError(
                f"EpisodesFrom: {count} images of {self.channels} x {self.size} x {self.size} take {size_text(wanted)}; this "
                f"machine has {size_text(memory)} free. Lower size, or keep the images in files: data set image_folder"
            )
        pixels = np.empty((count, *self.image_shape), np.uint8)
        labels: list[Hashable] = []
        for i in range(count):
            # The data set's own code, and Pillow's: either may raise anything.
            with refusing(functools.partial(_refused, f"item {i}")):
                image, label = _pair(self.dataset[i], i)
            try:
                with refusing(UnreadableImage):
                    pixels[i] = pixels_of(
                        pillow_image(image), (self.size, self.size), self.channels, self.resize
                    )
            except UnreadableImage as error:
                raise _refused(f"the image of item {i}", str(error)) from error
            labels.append(label)
        names = _sorted(labels)
        number = {name: i for i, name in enumerate(names)}
        of_row = np.array([number[label] for label in labels])
        order = np.argsort(of_row, kind="stable")
        images = pixels[order]
        per_class = np.bincount(of_row, minlength=len(names)).astype(np.int64)
        start = np.cumsum(per_class) - per_class
        digest = hashlib.sha256(repr((self.image_shape, names, per_class.tolist())).encode())
        digest.update(images.tobytes())
        splits = {
            split: ClassRows(start[rows], per_class[rows], [str(names[i]) for i in rows])
            for split, rows in self._splits(names).items()
        }
        return Table(images, splits, digest.hexdigest(), ())

    def _splits(self, names: list[Hashable]) -> dict[Split, np.ndarray]:
        if not isinstance(self.split, Mapping):
            width = len(str(len(names)))
            drawn = drawn_splits(
                [f"{i:0{width}}" for i in range(len(names))],
                self.split or DEFAULT_SHARES,
                self.split_seed,
            )
            return {split: np.array([int(i) for i in of], np.int64) for split, of in drawn.items()}
        listed = [label for labels in self.split.values() for label in _listed(labels)]
        unknown = [str(label) for label in listed if label not in names]
        if unknown or len(set(listed)) < len(listed) or set(self.split) - set(SPLITS):
            raise DataError(
                "EpisodesFrom: split: wanted labels of the data set under train, validation and test, each "
                f"label once; unknown or twice: {shown(unknown or sorted({str(a) for a in listed if listed.count(a) > 1}))}"
            )
        return {
            split: np.array(
                sorted(names.index(label) for label in self.split.get(split, ())), np.int64
            )
            for split in SPLITS
        }


def _listed(labels: Any) -> Sequence[Hashable]:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ConfigError(f"EpisodesFrom: split: got {labels!r}; wanted a list of labels")
    return labels


def _numbers(values: Any, count: int, least: float = -math.inf) -> bool:
    """Whether these are so many finite numbers, none below `least`."""
    return (
        not isinstance(values, str)
        and len(values) == count
        and all(isinstance(v, int | float) and math.isfinite(v) and v >= least for v in values)
    )


def _refused(where: str, why: str) -> DataError:
    return DataError(f"EpisodesFrom: {where}: {why}")


def _sorted(labels: Sequence[Hashable]) -> list[Hashable]:
    """The classes, in an order that is the same in every process. Raises DataError."""
    wanted = "wanted a text, a whole number or a tuple of them"
    for i, label in enumerate(labels):
        where = f"the label of item {i}"
        with refusing(functools.partial(_refused, where)):
            hash(label)
            # NaN is no class; an object that is known by its address has another one tomorrow.
            if label != label or type(label).__repr__ is object.__repr__:
                raise _refused(where, f"got {label!r}; {wanted}")
    kinds = {(type(label).__name__, label) for label in labels}
    if len(kinds) > len(set(labels)):
        alike = sorted(
            {repr(a) for _, a in kinds for _, b in kinds if a == b and type(a) is not type(b)}
        )
        raise _refused("labels", f"{shown(alike)} are equal in Python; wanted labels of one type")
    with refusing(functools.partial(_refused, "the labels cannot be sorted")):
        return sorted(set(labels), key=lambda label: (type(label).__name__, label))
    raise AssertionError("unreachable")


def _pair(item: Any, i: int) -> tuple[Any, Hashable]:
    """Image and label of an item; labels that are arrays of one number become that number."""
    if isinstance(item, Mapping):
        image = item.get("image", item.get("img"))
        label = item.get("label", item.get("labels"))
    elif isinstance(item, Sequence) and len(item) == 2:
        image, label = item
    else:
        raise DataError(
            f"EpisodesFrom: item {i} is {type(item).__name__}; wanted a pair (image, label), or a mapping with "
            "the entries image and label"
        )
    if image is None or label is None:
        raise DataError(f"EpisodesFrom: item {i} has no image or no label")
    label = label.item() if hasattr(label, "item") else label
    return image, label
