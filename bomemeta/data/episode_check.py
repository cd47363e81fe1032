"""Whether a data set's episodes are what a problem takes them for: looked at before a run, and each
again as it is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from bomemeta.boundary import refusing
from bomemeta.data.episodes import Episode, EpisodeSource, EpisodeSpec, Split
from bomemeta.errors import DataError

LOOKED_AT = 2  # episodes of each split
PARTS = ("support", "query")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of the range's width: noise and interpolation overshoot; 0 to 255 and standardised numbers do more.
SLACK = 1.0
# A data set may have an image twice; a query set that is the support set is another matter.
SHARED_SHARE = 0.1
SHOWN = 8


def check_episodes(
    source: EpisodeSource, specs: Mapping[Split, EpisodeSpec], seed: int
) -> dict[str, Any]:
    """Draws the first episodes of each split, each twice. Returns a digest of them, as JSON values.

    Raises DataError that names the data set's class, the split, what was got and what was wanted:
    where a draw fails, images or labels have another form, numbers are not finite or not in the
    data set's `value_range` (0..1 where it names none), the same key gives other bits, or query
    images are support images.
    """
    content: dict[str, Any] = {
        "data set": type(source).__name__,
        "image shape": list(_image_shape(source)),
    }
    low, high = _value_range(source)
    for number, (split, spec) in enumerate(specs.items()):
        bits = hashlib.sha256()
        for task in range(LOOKED_AT):
            key = (seed, number, task)
            episode, again = (checked(source, split, spec, key) for _ in range(2))
            where = f"{type(source).__name__}, split {split}, episode {task}"
            for part in PARTS:
                _check_numbers(getattr(episode, part), low, high, f"{where}: the {part} images")
            for name, one, other in zip(Episode._fields, episode, again, strict=True):
                if not torch.equal(one, other):
                    _refuse(
                        f"{where}:",
                        f"two draws with the key {key} gave different {name.replace('_', ' ')}",
                        "the same bits for the same key, in every process: draw from np.random.default_rng(key) alone",
                    )
                bits.update(_bytes(one))
            _check_disjoint(episode, where)
        content[f"first {split} episodes"] = bits.hexdigest()
    return content


def checked(
    source: EpisodeSource, split: Split, spec: EpisodeSpec, key: tuple[int, ...]
) -> Episode:
    """The episode of this key with its rows sorted by label. Raises DataError where its form is not
    that of `Episode`, and where the source raises.
    """

    def refused(why: str) -> DataError:
        return DataError(
            f"{type(source).__name__}, split {split}, episode {key[-1]}: episode() raised {why}. Wanted an "
            f"episode of {spec.ways} ways, {spec.shots} shots and {spec.queries} queries"
        )

    with refusing(refused):
        drawn = source.episode(split, spec, key)
    return in_order(drawn, source, spec, f"split {split}, episode {key[-1]}")


def in_order(episode: Any, source: EpisodeSource, spec: EpisodeSpec, which: str) -> Episode:
    """The episode with its rows sorted by label, which is what losses take them to be. `which` is
    for messages: its split and number.
    """
    where = f"{type(source).__name__}, {which}"
    if not isinstance(episode, tuple) or len(episode) != len(Episode._fields):
        _refuse(
            f"{where}:",
            f"episode() gave {type(episode).__name__}",
            "an Episode(support, support_labels, query, query_labels)",
        )
    support, support_labels, query, query_labels = episode
    parts = (
        ("support", support, support_labels, spec.shots),
        ("query", query, query_labels, spec.queries),
    )
    found: list[Tensor] = []
    for name, images, labels, each in parts:
        _check_images(
            images, (spec.ways * each, *source.image_shape), f"{where}: the {name} images"
        )
        found += _sorted(images.detach(), labels, spec.ways, each, f"{where}: the {name} labels")
    return Episode(*found)


def _image_shape(source: EpisodeSource) -> tuple[int, ...]:
    name = f"{type(source).__name__}.image_shape"
    with refusing(lambda why: DataError(f"{name}: {why}")):
        shape: Any = source.image_shape
        if (
            not isinstance(shape, tuple | list)
            or len(shape) != 3
            or not all(type(side) is int and side > 0 for side in shape)
        ):
            _refuse(name, f"is {shape!r}", "(channels, height, width), three whole numbers")
    return tuple(shape)


def _value_range(source: EpisodeSource) -> tuple[float, float]:
    name = f"{type(source).__name__}.value_range"
    with refusing(lambda why: DataError(f"{name}: {why}")):
        found: Any = getattr(source, "value_range", (0.0, 1.0))
        if (
            not isinstance(found, tuple | list)
            or len(found) != 2
            or not all(isinstance(end, int | float) and math.isfinite(end) for end in found)
            or not found[0] < found[1]
        ):
            _refuse(name, f"is {found!r}", "(lowest, highest), two finite numbers")
    return float(found[0]), float(found[1])


def _check_images(images: Any, shape: Sequence[int], where: str) -> None:
    if not isinstance(images, Tensor):
        _refuse(where, f"are {type(images).__name__}", "a torch tensor, float32")
    if images.dtype not in FLOATS:
        hint = ": divide by 255" if images.dtype == torch.uint8 else ""
        _refuse(where, f"are {images.dtype}", f"float32 in 0..1{hint}")
    _check_memory(images, where)
    if tuple(images.shape) != tuple(shape):
        _refuse(
            where,
            f"are {list(images.shape)}",
            f"{list(shape)}: ways times images of each, then image_shape (channels, height, width)",
        )


def _sorted(images: Tensor, labels: Any, ways: int, each: int, where: str) -> tuple[Tensor, Tensor]:
    """Images and labels in the labels' order."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        _refuse(where, f"are {got}", "a torch tensor, int64")
    _check_memory(labels, where)
    if labels.shape != (ways * each,):
        _refuse(where, f"are {list(labels.shape)}", f"[{ways * each}]: one for each image")
    wanted = torch.arange(ways).repeat_interleave(each)
    if torch.equal(labels, wanted):
        return images, labels
    order = torch.argsort(labels, stable=True)
    if torch.equal(labels[order], wanted):
        return images[order], wanted
    values, counts = torch.unique(labels, return_counts=True)
    got = ", ".join(
        f"{value} ({count} times)"
        for value, count in zip(values[:SHOWN].tolist(), counts[:SHOWN].tolist(), strict=True)
    ) + (", ..." if len(values) > SHOWN else "")
    return _refuse(where, f"are {got}", f"each of 0..{ways - 1} {each} times")


def _check_memory(tensor: Tensor, where: str) -> None:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        got = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        _refuse(where, f"are {got}, on {tensor.device}", "a dense tensor on the CPU")


def _check_numbers(images: Tensor, low: float, high: float, where: str) -> None:
    finite = images.isfinite()
    if not finite.all():
        rows = (~finite.flatten(1).all(1)).nonzero()[:, 0]
        _refuse(
            where,
            f"have NaN or infinite numbers, in {len(rows)} of {len(images)} images (first in row {int(rows[0])})",
            "finite numbers",
        )
    least, most = float(images.min()), float(images.max())
    slack = SLACK * (high - low)
    if least < low - slack or most > high + slack:
        _refuse(
            where,
            f"have numbers from {least:.4g} to {most:.4g}",
            f"{low:g} to {high:g}: scale them, or name their range in the class as value_range = (lowest, highest)",
        )


def _check_disjoint(episode: Episode, where: str) -> None:
    support, query = (part.flatten(1) for part in (episode.support, episode.query))
    varied = (query != query[:, :1]).any(1)  # flat pictures may be alike and yet two
    known = {_bytes(row) for row in support}
    shared = [row for row in varied.nonzero()[:, 0].tolist() if _bytes(query[row]) in known]
    if len(shared) > SHARED_SHARE * len(query):
        _refuse(
            f"{where}:",
            f"{len(shared)} of {len(query)} query images are support images, bit for bit (first in row {shared[0]})",
            "support and query without a common image: accuracy would be measured on what was learned",
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _refuse(where: str, got: str, wanted: str) -> NoReturn:
    raise DataError(f"{where} {got}. Wanted {wanted}")
