"""Omniglot (Lake, Salakhutdinov and Tenenbaum, Science 2015): 1,623 hand-written characters, 20
drawings of each.

The split is that of Vinyals et al. (Matching Networks, NeurIPS 2016) as Snell et al. (Prototypical
Networks, NeurIPS 2017) gave it: 1,028 training, 172 validation and 423 test characters. With
`rotations` a character turned by 90, 180 or 270 degrees is a class of its own, in every split, as
both papers do: four times the classes, and an episode may hold two turns of one character.

That split keeps alphabets apart but one: test characters are of 13 alphabets, 12 of them unseen in
training. The released code of Finn et al. (MAML, ICML 2017) shuffles all characters instead, 1,100
/ 100 / 423, so that test characters share their alphabets with training ones: `characters:
shuffled`. Accuracies on the two are not comparable.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bomemeta.data import archives
from bomemeta.data.class_images import ClassRows, check_size, episode_of, generator
from bomemeta.data.digest import sha256
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.errors import DataError
from bomemeta.registry import datasets

FILE = "omniglot28.npz"
IMAGE_PX = 28
TURN, SIZE, SLANT, SHIFT = 0.25, 0.15, 0.2, 0.08  # the most that `deform` does
SPLIT_NUMBER: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
SHUFFLED_COUNTS = (1100, 100, 423)  # characters of each split, MAML's
SHUFFLE_SEED = 0  # of the data, not of a run: all runs have the same test characters


@dataclass(frozen=True)
class Characters:
    """The archive in memory."""

    images: Tensor  # uint8 [rows, 28, 28], ink 255; the drawings of a class follow each other
    upright: dict[Split, ClassRows]
    turned: dict[
        Split, ClassRows
    ]  # class `turn * characters + c` is character c turned by `turn` quarters

    def classes(self, split: Split, rotations: bool) -> ClassRows:
        return self.turned[split] if rotations else self.upright[split]


@datasets.register("omniglot")
@dataclass(frozen=True, kw_only=True)
class Omniglot:
    """Omniglot's 1,623 hand-written characters. `deform` draws from the episode's key. `root`: the folder that holds `omniglot28.npz`; by
    default `BOMEMETA_DATA`. `characters`: how they are split, by alphabets (`vinyals`) or at random as MAML does (`shuffled`).
    """

    root: str | None = None
    rotations: bool = True
    characters: Literal["vinyals", "shuffled"] = "vinyals"
    deform: bool = (
        False  # training drawings are turned, scaled, slanted and moved a little, each anew
    )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, IMAGE_PX, IMAGE_PX

    def prepare(self) -> None:
        """Reads the archive. Raises DataError where it is missing or damaged."""
        self._characters()

    def digest(self) -> str:
        """Of all drawings, for checkpoints."""
        return sha256(self._characters().images)

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        """Raises DataError where the split has too few classes, or one of them too few drawings."""
        path = archives.find("omniglot", FILE, self.root)
        _check(path, self.characters, self.rotations, split, spec)

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        """Ink 1 on 0, `[n, 1, 28, 28]`."""
        path = archives.find("omniglot", FILE, self.root)
        _check(path, self.characters, self.rotations, split, spec)
        characters = _read(path, self.characters)
        rng = generator(key)
        draw = characters.classes(split, self.rotations).draw(spec, rng)
        turns = (draw.classes // len(characters.upright[split].count)).tolist()
        turned = _turned(characters.images, np.concatenate([draw.support, draw.query], 1), turns)
        support, query = _floats(turned[:, : spec.shots]), _floats(turned[:, spec.shots :])
        if self.deform and split == "train":
            support, query = deformed(support, rng), deformed(query, rng)
        return episode_of(support, query, spec)

    def class_names(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> list[str]:
        """The names of the characters of the episode of this key."""
        return self._characters().classes(split, self.rotations).names_of(spec, key)

    def class_count(self, split: Split, spec: EpisodeSpec) -> int:
        """How many classes such episodes are drawn from."""
        return len(self._characters().classes(split, self.rotations).count)

    def class_numbers(
        self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """The numbers `[ways]` of the characters of the episode of this key."""
        return self._characters().classes(split, self.rotations).numbers_of(spec, key)

    def _characters(self) -> Characters:
        return _read(archives.find("omniglot", FILE, self.root), self.characters)


@functools.cache
def _read(path: Path, characters: str) -> Characters:
    arrays = archives.read(path, ("images", "label", "class_name", "class_vinyals_split"))
    images, label, names, split_number = arrays.values()
    classes = names.size
    labelled = label.ndim == 1 and label.dtype.kind in "iu" and label.size > 0
    within = labelled and label.min() >= 0 and label.max() < classes  # bincount takes any size
    count = np.bincount(label, minlength=classes) if within else np.zeros(0, np.int64)
    if (
        images.dtype != np.uint8
        or images.shape != (label.size, IMAGE_PX, IMAGE_PX)
        or names.ndim != 1
        or split_number.shape != (classes,)
        or not np.isin(split_number, list(SPLIT_NUMBER.values())).all()
        or count.shape != (classes,)
        or np.any(label[1:] < label[:-1])
    ):
        raise DataError(
            f"{path}: wanted uint8 images [rows, {IMAGE_PX}, {IMAGE_PX}], rows sorted by a label below {classes}, and a split per "
            f"class; got images {images.dtype} {images.shape}, {label.size} labels, {split_number.size} splits. "
            f"Delete it and run `bomemeta data prepare omniglot`"
        )
    if characters == "shuffled":
        if classes != sum(SHUFFLED_COUNTS):
            raise DataError(
                f"{path}: data.characters: shuffled splits Omniglot's {sum(SHUFFLED_COUNTS):,} characters and got {classes:,}; use "
                f"vinyals, or delete the file and run `bomemeta data prepare omniglot`"
            )
        order = np.random.default_rng(SHUFFLE_SEED).permutation(classes)
        split_number = np.empty(classes, np.int64)
        split_number[order] = np.repeat(tuple(SPLIT_NUMBER.values()), SHUFFLED_COUNTS)
    start = np.cumsum(count) - count
    splits: dict[Split, ClassRows] = {}
    for split, number in SPLIT_NUMBER.items():
        (of_split,) = np.nonzero(split_number == number)
        splits[split] = ClassRows(start[of_split], count[of_split], tuple(names[of_split].tolist()))
    return Characters(
        torch.from_numpy(images),
        splits,
        {split: _with_turns(rows) for split, rows in splits.items()},
    )


@functools.cache  # episodes ask again and again; what raises is not kept
def _check(path: Path, characters: str, rotations: bool, split: Split, spec: EpisodeSpec) -> None:
    rows = _read(path, characters).classes(split, rotations)
    check_size("omniglot", split, spec, rows.names, rows.count)


def _with_turns(rows: ClassRows) -> ClassRows:
    names = tuple(f"{name} turned {90 * turn}" for turn in range(4) for name in rows.names)
    return ClassRows(np.tile(rows.start, 4), np.tile(rows.count, 4), names)


def _turned(images: Tensor, rows: NDArray[np.int64], turns: list[int]) -> Tensor:
    """The images of rows [ways, k], way by way turned by `turns` quarters: uint8 [ways, k, 28, 28]."""
    ways = images[torch.from_numpy(rows)]
    turned = [torch.rot90(way, turn, (1, 2)) for way, turn in zip(ways, turns, strict=True)]
    return torch.stack(turned)


def deformed(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images `[n, 1, H, W]`, floats, each under an affine map of its own: up to TURN radians, a size
    of exp(+-SIZE), a slant of SLANT, and SHIFT of the side to each direction; all uniform.
    """
    n = len(images)
    angle, size, slant, right, down = rng.uniform(-1.0, 1.0, (5, n))
    cos, sin = np.cos(TURN * angle), np.sin(TURN * angle)
    scale, slant = np.exp(SIZE * size), SLANT * slant
    theta = np.empty((n, 2, 3))  # image to drawing, in units of half a side
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale, (cos * slant - sin) * scale
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale, (sin * slant + cos) * scale
    theta[:, 0, 2], theta[:, 1, 2] = 2 * SHIFT * right, 2 * SHIFT * down
    grid = functional.affine_grid(
        torch.from_numpy(theta).to(images.dtype), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False).clamp_(0, 1)


def _floats(images: Tensor) -> Tensor:
    """uint8 [ways, k, 28, 28] as float32 [ways * k, 1, 28, 28] in [0, 1]."""
    return images.reshape(-1, 1, *images.shape[2:]).contiguous().float().div_(255)
