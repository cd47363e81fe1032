"""Few-shot classes from the fonts that matplotlib carries: real letter shapes, no download, ready
in seconds.

A class is a code point, an image of it is one face's glyph (8 to 16 faces: sans, serif, mono and
Times-like; upright, slanted and bold), and every draw bends it anew: rotation, size, width against
height, slant, position and stroke weight, all from the episode's key. The faces of the queries are
never those of the support.

Splits are by script, so that a test class is unseen and so is its script:

    train       Latin and everything without a script: digits, punctuation, mathematics, arrows, boxes, Braille    1,489 classes
    validation  Cyrillic, Armenian, Lao                                                                              231 classes
    test        Greek, Coptic, Georgian                                                                              356 classes

Counts are matplotlib 3.11's. Code points that look alike are one class at most (Latin A and Greek
Alpha, 0 and O, the hyphens): glyphs are compared in the same face. Size and position on the line
are no part of a class: every glyph is fitted into the same square.

Nearest neighbour by pixels (cosine) gets 53 % of 5-way 1-shot test queries, on Omniglot 49 %:
neither trivial nor noise, with the perturbations below.
"""

from __future__ import annotations

import contextlib
import functools
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data import archives
from bomemeta.data.class_images import ClassRows, check_spec, check_ways, episode_of, generator
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.errors import DataError
from bomemeta.registry import datasets

# Part of the cache's file name: raise it with any change to what is rendered.
VERSION = 1

# The families with wide, properly encoded coverage. Left out: the last-resort font (placeholder
# boxes), Computer Modern (old TeX encodings: its code points are not Unicode's), STIX's private-use
# and big-delimiter fonts, DejaVu's Display cuts (47 glyphs). The first four are the upright faces
# in which glyphs are compared.
FACES = (
    "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral",
    "DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique", "STIXGeneralItalic",
    "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol",
    "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "DejaVuSansMono-BoldOblique", "STIXGeneralBolIta",
)  # fmt: skip
COMPARED_FACES = 4
FEWEST_FACES = 8  # 5 shots leave three faces unseen for the queries

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_OF_SCRIPT: dict[str, Split] = {
    "CYRILLIC": "validation",
    "ARMENIAN": "validation",
    "LAO": "validation",
    "GREEK": "test",
    "COPTIC": "test",
    "GEORGIAN": "test",
}  # every other script: train

# Cosine of two slightly blurred glyphs in the same face, from which they count as the same shape.
# Looked at by eye: from 0.97 up pairs are copies or differ by a pixel of an accent (Cyrillic and
# Latin M as small capitals, a-diaeresis in two alphabets), down to 0.93 many still read as the same
# letter (Cyrillic I, Latin l, a bar), below that few do. Across splits the price of a missed copy
# is a leak, so the bound is lower there.
SAME_WITHIN_SPLIT = 0.97
SAME_ACROSS_SPLITS = 0.93

FONT_PX = 72  # about twice the stored size: strokes are anti-aliased by the reduction
STORED_PX = 32
IMAGE_PX = 28
GLYPH_PX = 20  # longer side of an unperturbed glyph in the image, MNIST's convention

# Bounds of the uniform perturbations.
ROTATION = math.radians(15)  # more would turn one arrow, bracket or dash pattern into its neighbour
LOG_SIZE = 0.15  # 17 to 23 px: still inside the image
LOG_ASPECT = 0.15
SLANT = 0.15  # about the difference between an upright and an oblique face
SHIFT_PX = 2.0  # what keeps a 23 px glyph inside the image
THINNER, THICKER = (
    -0.5,
    1.0,
)  # share of one pixel of erosion or dilation at stored size; a full erosion would delete hairlines


@dataclass(frozen=True)
class Rendered:
    """All classes of all splits, rendered and not yet perturbed."""

    images: Tensor  # uint8 [rows, STORED_PX, STORED_PX], ink 255; the rows of a class are its faces
    splits: dict[Split, ClassRows]


@datasets.register("glyphs")
@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """Letter shapes from matplotlib's fonts, nothing to download.

    `root`: folder of the rendered cache; by default `BOMEMETA_CACHE`, or else `~/.cache/bomemeta`.
    """

    root: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, IMAGE_PX, IMAGE_PX

    def prepare(self) -> None:
        """Renders the fonts, or reads what an earlier process rendered. Raises DataError where
        matplotlib lacks its fonts.
        """
        _glyphs(cache_folder(self.root))

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        """Raises DataError where the split has too few classes or the faces of a class do not
        outnumber the shots.
        """
        rows = _glyphs(cache_folder(self.root)).splits[split]
        check_spec("glyphs", spec)
        check_ways("glyphs", split, spec, len(rows.count))
        smallest = int(np.argmin(rows.count))
        if rows.count[smallest] <= spec.shots:
            raise DataError(
                f"glyphs: class {rows.names[smallest]} ({split}) has {rows.count[smallest]} faces; the support takes "
                f"{spec.shots} of them and the queries need another: lower problem.shots"
            )

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        """Ink 1 on 0, `[n, 1, 28, 28]`. Queries beyond the faces left over repeat a face under
        another perturbation.
        """
        self.check(split, spec)
        glyphs = _glyphs(cache_folder(self.root))
        rng = generator(key)
        draw = glyphs.splits[split].draw(spec, rng)
        rows = np.concatenate([draw.support.ravel(), draw.query.ravel()])
        images = _perturb(glyphs.images[torch.from_numpy(rows)], rng)
        supports = draw.support.size
        return episode_of(images[:supports], images[supports:], spec)

    def class_count(self, split: Split, spec: EpisodeSpec) -> int:
        """How many classes such episodes are drawn from."""
        return len(_glyphs(cache_folder(self.root)).splits[split].count)

    def class_numbers(
        self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """The numbers `[ways]` of the characters of the episode of this key."""
        return _glyphs(cache_folder(self.root)).splits[split].numbers_of(spec, key)

    def class_names(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> list[str]:
        """The names of the characters of the episode of this key."""
        return _glyphs(cache_folder(self.root)).splits[split].names_of(spec, key)


def _perturb(stored: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 `[n, STORED_PX, STORED_PX]` to float32 `[n, 1, IMAGE_PX, IMAGE_PX]` in [0, 1], each
    under its own perturbation.
    """
    n = len(stored)
    angle, size, aspect, slant, right, down, stroke = rng.uniform(-1.0, 1.0, (7, n))
    images, thick, thin = (
        levels[:, None].float() / 255
        for levels in (
            stored,
            _over_neighbours(stored, torch.maximum),
            _over_neighbours(stored, torch.minimum),
        )
    )
    weight = (
        torch.from_numpy(np.interp(stroke, (-1, 1), (THINNER, THICKER))).float().view(n, 1, 1, 1)
    )
    images = images + weight.clamp(min=0) * (thick - images) - weight.clamp(max=0) * (thin - images)

    width = np.exp(LOG_SIZE * size + LOG_ASPECT * aspect / 2)
    height = np.exp(LOG_SIZE * size - LOG_ASPECT * aspect / 2)
    cos, sin, slant = np.cos(ROTATION * angle), np.sin(ROTATION * angle), SLANT * slant
    forward = np.empty((n, 2, 2))  # glyph to image: rotation @ slant @ size
    forward[:, 0, 0], forward[:, 0, 1] = cos * width, (cos * slant - sin) * height
    forward[:, 1, 0], forward[:, 1, 1] = sin * width, (sin * slant + cos) * height
    # grid_sample asks where in the glyph an image point comes from, both in units of half a side.
    backward = np.linalg.inv(forward) * (IMAGE_PX / GLYPH_PX)
    shift = np.stack([right, down], axis=1)[:, :, None] * (SHIFT_PX / (IMAGE_PX / 2))
    theta = torch.from_numpy(np.concatenate([backward, -backward @ shift], axis=2)).float()
    grid = F.affine_grid(theta, [n, 1, IMAGE_PX, IMAGE_PX], align_corners=False)
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    ).clamp_(0, 1)


def _over_neighbours(images: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The largest (or smallest) of each pixel and its neighbours, `[n, h, w]`: a 3x3 max-pool on
    bytes, ten times as fast as torch's.
    """
    for axis in (1, 2):
        last = images.shape[axis] - 1
        before, after = images.narrow(axis, 0, last), images.narrow(axis, 1, last)
        images = images.clone()
        for target, source in (
            (images.narrow(axis, 1, last), before),
            (images.narrow(axis, 0, last), after),
        ):
            target.copy_(pick(target, source))
    return images


def cache_folder(root: str | None) -> Path:
    """Where the rendered archive lies: `root`, `BOMEMETA_CACHE` or the user's cache."""
    from bomemeta.data.image_cache import cache_folder as shared

    return shared(root)


def cache_path(folder: Path) -> Path:
    """The rendered archive in `folder`; its name holds all that decides the pixels: fonts,
    renderer, the names of characters.
    """
    import matplotlib
    import PIL

    made_by = f"matplotlib-{matplotlib.__version__}-pillow-{PIL.__version__}-unicode-{unicodedata.unidata_version}"
    return folder / f"glyphs-{VERSION}-{made_by}.npz"


@functools.cache
def _glyphs(folder: Path) -> Rendered:
    """The glyphs from `folder`'s cache, rendered where it has none; written there if it can be."""
    import matplotlib

    path = cache_path(folder)
    try:
        arrays = archives.read(path, ("images", "count", "code_point", "split"))
        _check(arrays, path)
    except DataError:  # absent or damaged: rendering replaces it
        arrays = render(Path(matplotlib.get_data_path()) / "fonts" / "ttf")
        with contextlib.suppress(
            OSError
        ):  # a cache that cannot be written only costs the next process a rendering
            archives.write(
                path, arrays, compress=False
            )  # 25 MB; compressing takes as long as half the rendering

    count = arrays["count"].astype(np.int64)
    start = np.cumsum(count) - count
    splits = {}
    for number, split in enumerate(SPLITS):
        (of_split,) = np.nonzero(arrays["split"] == number)
        names = [
            f"U+{c:04X} {unicodedata.name(chr(c))}" for c in arrays["code_point"][of_split].tolist()
        ]
        splits[split] = ClassRows(start[of_split], count[of_split], names)
    return Rendered(torch.from_numpy(arrays["images"]), splits)


def _check(arrays: dict[str, NDArray[Any]], path: Path) -> None:
    """Raises DataError where the arrays are not those that `render` makes."""
    images, count, code_point, split = arrays.values()
    whole = all(a.ndim == 1 and a.dtype.kind in "iu" for a in (count, code_point, split))
    if (
        not whole
        or not len(count) == len(code_point) == len(split)
        or images.dtype != np.uint8
        or images.shape != (count.sum(), STORED_PX, STORED_PX)
        or not np.isin(split, range(len(SPLITS))).all()
    ):
        raise DataError(f"{path} has not the arrays that were rendered")


def render(fonts: Path) -> dict[str, NDArray[Any]]:
    """Renders every class from the font files in `fonts`. Deterministic.

    Returns `images` uint8 [rows, 32, 32], and per class `count` (its rows follow each other),
    `code_point` and `split` (index into SPLITS). Raises DataError where a font file is missing.
    """
    coverage = {face: _code_points(fonts / f"{face}.ttf") for face in FACES}
    # Letters, numbers, punctuation and symbols; a mark or a control character alone is no shape to
    # learn.
    candidates = sorted(
        c for c in set().union(*coverage.values()) if unicodedata.category(chr(c))[0] in "LNPS"
    )
    shapes: dict[int, dict[str, NDArray[np.uint8]]] = {c: {} for c in candidates}
    for face in FACES:
        drawn = _draw_face(fonts / f"{face}.ttf", [c for c in candidates if c in coverage[face]])
        for c, shape in drawn.items():
            shapes[c][face] = shape
    shapes = {c: faces for c, faces in shapes.items() if len(faces) >= FEWEST_FACES}
    kept = _distinct(shapes)
    return {
        "images": np.stack([shape for c in kept for shape in shapes[c].values()]),
        "count": np.array([len(shapes[c]) for c in kept], np.int16),
        "code_point": np.array(kept, np.int32),
        "split": np.array([SPLITS.index(split_of(c)) for c in kept], np.int8),
    }


def split_of(code_point: int) -> Split:
    """The split of a code point's script, read from its name; a compatibility form (micro sign)
    follows what it stands for.
    """
    characters = chr(code_point) + unicodedata.normalize("NFKD", chr(code_point))
    parts = " ".join(unicodedata.name(c, "") for c in characters).replace("-", " ").split()
    for script, split in SPLIT_OF_SCRIPT.items():
        if script in parts:
            return split
    return "train"


def _code_points(font: Path) -> set[int]:
    from matplotlib.ft2font import FT2Font

    if not font.is_file():
        raise DataError(
            f"glyphs: {font} is missing; matplotlib's own fonts are the data. Reinstall matplotlib, or choose another data.dataset"
        )
    return set(FT2Font(str(font)).get_charmap())


def _draw_face(font: Path, code_points: list[int]) -> dict[int, NDArray[np.uint8]]:
    """Each glyph that has ink, cropped to it and fitted into a square of STORED_PX with its
    proportions kept.
    """
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(font), FONT_PX, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new(
        "L", (4 * FONT_PX, 3 * FONT_PX)
    )  # the widest glyphs are arrows of less than 2.5 em
    pen = ImageDraw.Draw(canvas)
    drawn = {}
    for c in code_points:
        canvas.paste(0, (0, 0, *canvas.size))
        pen.text((FONT_PX, FONT_PX), chr(c), fill=255, font=face)
        box = canvas.getbbox()
        if box is None:
            continue
        glyph = canvas.crop(box)
        factor = STORED_PX / max(glyph.size)
        width, height = (max(1, round(side * factor)) for side in glyph.size)
        fitted = glyph.resize(
            (width, height), Image.Resampling.BILINEAR
        )  # Pillow's bilinear averages when it reduces
        square = np.zeros((STORED_PX, STORED_PX), np.uint8)
        top, left = (STORED_PX - height) // 2, (STORED_PX - width) // 2
        square[top : top + height, left : left + width] = np.asarray(fitted)
        drawn[c] = square
    return drawn


def _distinct(shapes: dict[int, dict[str, NDArray[np.uint8]]]) -> list[int]:
    """The code points that look like none kept before them, in any of the compared faces; test
    first, so that it stays large.
    """
    order = sorted(shapes, key=lambda c: (-SPLITS.index(split_of(c)), c))
    likeness = np.zeros((len(order), len(order)), np.float32)
    for face in FACES[:COMPARED_FACES]:
        here = [i for i, c in enumerate(order) if face in shapes[c]]
        images = torch.from_numpy(np.stack([shapes[order[i]][face] for i in here])).float()
        # The blur forgives strokes that are a pixel apart.
        flat = F.normalize(F.avg_pool2d(images[:, None], 3, 1, 1).flatten(1))
        block = np.ix_(here, here)
        likeness[block] = np.maximum(likeness[block], (flat @ flat.T).numpy())
    split = np.array([SPLITS.index(split_of(c)) for c in order])
    bound = np.where(split[:, None] == split[None, :], SAME_WITHIN_SPLIT, SAME_ACROSS_SPLITS)
    alike = likeness >= bound
    kept: list[int] = []
    for i in range(len(order)):
        if not alike[i, kept].any():
            kept.append(i)
    return [order[i] for i in kept]
