"""Data sets of a user's own: episodes, map-style data sets and arrays with a fault. A run takes what
they say, row by row, or the fault is named.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz import mutate
from fuzz.data_files import npz
from fuzz.outcome import Silent

CLASSES, SIDE, ROWS = 12, 4, 8


class Source:
    """Class c's images have c / CLASSES in their corner, and noise of the key elsewhere."""

    def __init__(
        self, change: Callable[[Any], Any], split: str, shape: Any = (1, SIDE, SIDE)
    ) -> None:
        self.change, self.split, self.image_shape = change, split, shape

    def prepare(self) -> None:
        pass

    def check(self, split: str, spec: Any) -> None:
        pass

    def episode(self, split: str, spec: Any, key: tuple[int, ...]) -> Any:
        from bomemeta.data.episodes import Episode

        rng = np.random.default_rng(key)
        classes = rng.choice(CLASSES, spec.ways, replace=False)
        parts: list[Tensor] = []
        for each in (spec.shots, spec.queries):
            labels = np.repeat(np.arange(spec.ways), each)
            images = rng.random((len(labels), 1, SIDE, SIDE), np.float32)
            images[:, 0, 0, 0] = classes[labels] / CLASSES
            parts += [torch.from_numpy(images), torch.from_numpy(labels)]
        episode = Episode(*parts)
        return self.change(episode) if split == self.split else episode


class Odd(Exception):
    """An error of the data set's own, with a message that cannot be shown."""

    def __str__(self) -> str:
        raise ValueError("no text")


def episodes(rng: random.Random, folder: Path) -> None:
    """A source of episodes with a fault in one split."""
    from bomemeta.data.episode_check import check_episodes, checked
    from bomemeta.data.episodes import EpisodeSpec

    spec = EpisodeSpec(rng.choice((2, 3)), rng.choice((1, 2)), rng.choice((1, 3)))
    shape: Any = (1, SIDE, SIDE)
    if rng.random() < 0.1:
        shape = rng.choice((None, (), (1, 4), [1, 4, 4], (4, 4, 1), (1.0, 4.0, 4.0), "144", 3, torch.Size((1, 4, 4)),
        (1, -4, -4), (1, 4, 4, 1)))  # fmt: skip
    change, sound = (lambda e: e), True
    if rng.random() < 0.9:
        change, sound = _fault(rng)
    split = rng.choice(("train", "validation", "test"))
    source: Any = Source(change, split, shape)
    if rng.random() < 0.1:
        source.value_range = rng.choice((None, (0, 1), (1, 0), (0,), "01", (float("nan"), 1), (0, float("inf")), 3,
        [0.0, 1.0], (-1, 1), ("0", "1")))  # fmt: skip
    specs: Any = dict.fromkeys(("train", "validation", "test"), spec)
    check_episodes(source, specs, 3)
    for task in range(4):
        before = Source(lambda e: e, "none").episode(split, spec, (3, 0, task))
        found = checked(source, split, spec, (3, 0, task))
        for images, labels, old, old_labels in (
            (found[0], found[1], before[0], before[1]), (found[2], found[3], before[2], before[3]),
        ):  # fmt: skip
            if labels.tolist() != sorted(labels.tolist()):
                raise Silent("an episode's rows are not sorted")
            corner = {int(y): float(v) for v, y in zip(old[:, 0, 0, 0], old_labels, strict=True)}
            if sound and any(abs(corner[int(y)] - float(v)) > 1e-2 for v, y in zip(images[:, 0, 0, 0], labels,
            strict=True)):  # fmt: skip
                raise Silent("an episode's images have the labels of others")
        if not sound:
            raise Silent("an episode with a fault was taken")


def _fault(rng: random.Random) -> tuple[Callable[[Any], Any], bool]:
    """A change of an episode, and whether it is one and the same episode after it."""
    part, of = rng.choice(("support", "query")), rng.random()
    if of < 0.25:
        return lambda e: _mixed(e, rng.randrange(9)), True
    if of < 0.35:
        same: Callable[[Any], Any] = rng.choice((
            lambda e: tuple(e), lambda e: e._replace(support=e.support.double()), lambda e: e._replace(query=e.query.half()),
            lambda e: e._replace(support=e.support.clone().requires_grad_()),
            lambda e: e._replace(query=e.query.movedim(0, 3).clone().movedim(3, 0)),
            lambda e: e._replace(query=e.query[:1].expand(len(e.query), -1, -1, -1).clone().copy_(e.query)),
        ))  # fmt: skip
        return same, True
    if of < 0.6:
        images: Any = rng.choice((
            lambda x: x * float("nan"), lambda x: x / 0, lambda x: x * 255, lambda x: (x * 255).to(torch.uint8),
            lambda x: x.int(), lambda x: x > 0.5,
            lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x[:-1], lambda x: torch.cat([x, x[:1]]),
            lambda x: x[:0], lambda x: x[0], lambda x: x.flatten(1),
            lambda x: x.movedim(1, 3), lambda x: x[:, :, :-1], lambda x: x.repeat(1, 3, 1, 1), lambda x: None,
            lambda x: x.to_sparse(), lambda x: x.to("meta"),
            lambda x: x.to(torch.complex64), lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
            lambda x: x.to(torch.float8_e4m3fn) if x.dim() else x,
            lambda x: [*x], lambda x: torch.nested.nested_tensor([*x]), lambda x: x * 1e30,
            lambda x: x + torch.rand_like(x) * 0.1,
            lambda x: x + float(np.random.rand()) * 0.1, lambda x: x * 0 - 40,
        ))  # fmt: skip
        return lambda e: e._replace(**{part: images(getattr(e, part))}), False
    if of < 0.85:
        labels: Any = rng.choice((
            lambda y: y + 1, lambda y: y * 2, lambda y: y - 1, lambda y: y * 0, lambda y: y.float(),
            lambda y: y.int(), lambda y: y.numpy(), lambda y: y.tolist(), lambda y: y[:-1], lambda y: y[:, None],
            lambda y: torch.nn.functional.one_hot(y), lambda y: None,
            lambda y: y.to(torch.uint8), lambda y: y.to("meta"), lambda y: y.to_sparse(), lambda y: y + 2**62,
            lambda y: torch.tensor(0), lambda y: ["a"] * len(y),
            lambda y: torch.where(y == 0, y.max(), y), lambda y: torch.full_like(y, -(2**63)),
        ))  # fmt: skip
        return lambda e: e._replace(
            **{f"{part}_labels": labels(getattr(e, f"{part}_labels"))}
        ), False
    whole: Any = rng.choice((
        lambda e: None, lambda e: [*e], lambda e: e[:3], lambda e: e._asdict(), lambda e: (*e, 1), lambda e: 3,
        lambda e: "episode", lambda e: e._replace(query=e.support[:1].expand_as(e.query)),
        _raise(IndexError("7")), _raise(KeyError("class")), _raise(StopIteration()), _raise(AssertionError()),
        _raise(Odd()), _raise(MemoryError()), _raise(RecursionError("deep")),
        _raise(OSError(5, "Input/output error")), _raise(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")),
        _raise(NotImplementedError()),
    ))  # fmt: skip
    return whole, False


def _raise(error: BaseException) -> Callable[[Any], Any]:
    def fails(episode: Any) -> Any:
        raise error

    return fails


def _mixed(episode: Any, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    s, q = (torch.randperm(len(x), generator=g) for x in (episode.support, episode.query))
    return type(episode)(
        episode.support[s], episode.support_labels[s], episode.query[q], episode.query_labels[q]
    )


class Items:
    """A map-style data set of `(image, label)`."""

    def __init__(self, items: list[Any], count: Any = None) -> None:
        self.items, self.count = items, count

    def __len__(self) -> Any:
        return len(self.items) if self.count is None else self.count

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.items[i], BaseException):
            raise self.items[i]
        return self.items[i]


def items(rng: random.Random, folder: Path) -> None:
    """`EpisodesFrom` of images and labels, of which one to three are odd."""
    from bomemeta.data.episodes import EpisodeSpec
    from bomemeta.data.episodes_from import EpisodesFrom

    name = rng.choice((str, int, lambda c: (c, "x"), lambda c: f"{c:02}"))
    draw = np.random.default_rng(rng.randrange(99))
    made: list[Any] = [
        (draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8), name(c))
        for c in range(6)
        for _ in range(3)
    ]
    wanted = {i: (image.transpose(2, 0, 1), label) for i, (image, label) in enumerate(made)}
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        i = rng.randrange(len(made))
        wanted.pop(i, None)
        image, label = draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8), name(0)
        if rng.random() < 0.5:
            image = rng.choice((
                None, "a.png", b"x", 3, [], image[..., :2], image[0, 0], image.astype(float), image / 255.0,
                image * np.nan, image.astype(np.int64), image[:0],
                image[:, :, 0], torch.from_numpy(image), torch.from_numpy(image).movedim(2, 0), torch.rand(1, 4, 4),
                image.astype(object), image.astype("U4"),
                torch.rand(3, 4, 4).to("meta"), image[None], image.tolist(), (image / 255).astype(np.float16),
                image.astype(complex), np.ma.masked_array(image),
            ))  # fmt: skip
        else:
            label = rng.choice((
                None, [1], {}, np.array([1, 2]), np.int64(1), torch.tensor(1), torch.tensor([1, 2]), float("nan"), 1.5,
                True, b"a", (1, None), object(), 1 + 2j,
                "a\nb", "\ud800", 2**70, frozenset((1,)), np.str_("a"), np.array(1), "", -1, torch.tensor(1.0).to("meta"),
            ))  # fmt: skip
        made[i] = rng.choice((
            (image, label), (image, label), (image, label), {"image": image, "label": label}, {"img": image,
            "labels": label}, [image, label], (image,), (image, label, 1),
            None, 3, "ab", {"pixels": image}, IndexError("gone"), OSError("gone"), Odd(), StopIteration(),
        ))  # fmt: skip
    keys: dict[str, Any] = {"size": SIDE}
    if rng.random() < 0.2:
        keys |= rng.choice((
            {"size": 0}, {"size": -4}, {"size": 2.5}, {"size": None}, {"size": 10**7}, {"channels": 2}, {"channels": 0},
            {"resize": "zoom"}, {"split": [1]}, {"split": [0, 0, 0]},
            {"split": [1, -1, 1]}, {"split": [float("nan")] * 3}, {"split": "abc"}, {"split": {"train": ["nosuch"]}},
            {"split": {"training": []}}, {"split": {"train": 3}}, {"split_seed": -1},
            {"split_seed": "x"}, {"mean": (1,), "std": (0,)}, {"mean": (0.5, 0.5)}, {"mean": ("a",) * 3,
            "std": (1,) * 3}, {"small_classes": "keep"}, {"augmentation": lambda x: x[:1]},
            {"augmentation": 3}, {"augmentation": _raise(KeyError("x"))}, {"mean": (0.5,) * 3, "std": (float("nan"),) * 3},
        ))  # fmt: skip
    count = rng.choice((-1, 0, 3.5, None, 10**12, "x", 30)) if rng.random() < 0.1 else None
    source = EpisodesFrom(Items(made, count), **keys)
    source.prepare()
    table = source.table
    of_class = {
        rows.names[c]: table.images[rows.start[c] : rows.start[c] + rows.count[c]]
        for rows in table.splits.values()
        for c in range(len(rows.names))
    }
    if keys == {"size": SIDE} and count is None:
        for image, label in wanted.values():
            if not (of_class.get(str(label), image[None][:0]) == image).all((1, 2, 3)).any():
                raise Silent("an item's image is not in its class")
    for split in ("train", "validation", "test"):
        spec: Any = EpisodeSpec(1, 1, 1)
        source.check(split, spec)  # type: ignore[arg-type]
        if not source.episode(split, spec, (0, 0)).support.isfinite().all():  # type: ignore[arg-type]
            raise Silent("an episode has numbers that are not finite")


def tasks(rng: random.Random, folder: Path) -> None:
    """An archive of regression tasks, with an array that is odd, or bytes changed."""
    from bomemeta import api

    draw = np.random.default_rng(rng.randrange(99))
    arrays: dict[str, Any] = {
        "inputs": draw.standard_normal((6, ROWS, 2)), "targets": draw.standard_normal((6, ROWS)), "split": np.arange(6) % 3,
    }  # fmt: skip
    odd = rng.choice(list(arrays))
    old = arrays[odd]
    arrays[odd] = rng.choice((
        old, old.astype(np.float32), old.astype(int), old.astype("U8"), old.astype(complex) + 1j, old.astype(bool),
        old.astype(object), old * np.nan, old[:0], old[:3], old[..., :0],
        old[None], old.reshape(-1), np.float64(3), old * 1e300, old.astype(np.float16), old.astype("datetime64[s]"),
        old * 0, old + 7, -old, old + 0.5, old.astype(np.uint64), old.astype(">f8"),
        np.asfortranarray(old), old[:, :3] if old.ndim > 1 else old, old.astype(str), old[..., None],
    ))  # fmt: skip
    content = npz(arrays, rng)
    path = folder / "tasks.npz"
    path.write_bytes(mutate.data(rng, content) if rng.random() < 0.3 else content)
    api.train(
        {
            "problem": {"name": "few_shot_regression", "shots": 3, "queries": 2, "test_queries": 2, "hidden": [3]},
            "data": {"dataset": "regression_arrays", "path": str(path)}, "solver": {"name": "bome", "inner_steps": 1},
            "steps": 1, "tasks_per_step": 1, "evaluation": {"episodes": 2}, "log": {"tensorboard": False},
            "output_dir": str(folder / "run"),
        }
    )  # fmt: skip
    numbers = np.asarray(arrays[odd])
    if numbers.dtype.kind in "cMOUS" or (
        odd == "split" and not set(numbers.ravel().tolist()) <= {0, 1, 2}
    ):
        raise Silent(f"{odd} of {numbers.dtype} was taken for what it is not")
