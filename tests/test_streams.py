"""Streams of tasks from one data set: what each task does to its inputs, which samples it has, what
is refused.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from bomemeta.data import archives, image_sets
from bomemeta.data.image_sets import Cifar10Subset, Cifar100, Digits, MiniImagenet
from bomemeta.data.labelled import Examples, LabelledArrays
from bomemeta.data.streams import Stream, StreamSpec, build_stream, image_shape, rotated
from bomemeta.errors import ConfigError, DataError

CLASSES, SIDE = 6, 4
SPEC = StreamSpec(
    kind="permuted",
    tasks=3,
    samples=12,
    test_samples=5,
    classes_per_task=None,
    shuffle_classes=False,
    seed=3,
)


class Rows:
    """60 training and 30 test rows; each number of a row says which row, part and place it is, so
    that it can be found again.
    """

    features, classes, image_shape = SIDE * SIDE, CLASSES, (1, SIDE, SIDE)

    def prepare(self) -> None:
        pass

    def examples(self, part: str) -> Examples:
        count, first = (60, 0) if part == "train" else (30, 1000)
        inputs = (first + torch.arange(count, dtype=torch.float64))[:, None] + torch.arange(
            self.features
        ) / 100
        return Examples(inputs, torch.arange(count) % CLASSES)


def stream(**changes: Any) -> Stream:
    return build_stream(Rows(), dataclasses.replace(SPEC, **changes))


def rows_of(stream: Stream, part: str) -> torch.Tensor:
    """The data set's row of each sample; its smallest number is the row's own, wherever a
    permutation has put it.
    """
    return getattr(stream, part).examples.inputs.min(1).values.floor()


@pytest.mark.parametrize("kind", ["permuted", "split"])
def test_the_seed_is_all_there_is(kind: Any) -> None:
    first, again, other = stream(kind=kind), stream(kind=kind), stream(kind=kind, seed=4)
    assert torch.equal(first.train.examples.inputs, again.train.examples.inputs)
    assert torch.equal(first.test.examples.labels, again.test.examples.labels)
    assert not torch.equal(first.train.examples.inputs, other.train.examples.inputs)


@pytest.mark.parametrize("kind", ["permuted", "split"])
def test_parts_and_sizes(kind: Any) -> None:
    made = stream(kind=kind)
    assert made.train.starts == (0, 12, 24, 36)
    assert made.test.starts == (0, 5, 10, 15)
    assert made.train.tasks.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    train, test = rows_of(made, "train"), rows_of(made, "test")
    assert train.max() < 60  # the training part's
    assert test.min() >= 1000  # the test part's
    for t in range(3):
        assert len(set(train[12 * t : 12 * (t + 1)].tolist())) == 12  # none twice
    # Labels go with their rows.
    assert torch.equal(made.train.examples.labels, train.long() % CLASSES)
    assert torch.equal(made.test.examples.labels, (test.long() - 1000) % CLASSES)


def test_all_samples_where_no_number_is_given() -> None:
    assert stream(samples=None).train.starts == (0, 60, 120, 180)
    assert stream(kind="split", samples=None, test_samples=None).test.starts == (0, 10, 20, 30)


def test_a_task_has_one_permutation() -> None:
    made = stream(samples=None, test_samples=None)
    locations = {}
    for part, count in (("train", 60), ("test", 30)):
        inputs = getattr(made, part).examples.inputs.reshape(3, count, -1)
        locations[part] = ((inputs - inputs.floor()) * 100).round().long()
    for t in range(3):
        order = locations["train"][t, 0]
        assert sorted(order.tolist()) == list(range(SIDE * SIDE))
        assert (locations["train"][t] == order).all()
        assert (locations["test"][t] == order).all()
    assert len({tuple(locations["train"][t, 0].tolist()) for t in range(3)}) == 3


def test_permutations_do_not_depend_on_how_many_tasks_there_are() -> None:
    few, many = stream(), stream(tasks=5)
    assert torch.equal(few.train.examples.inputs, many.train.examples.inputs[:36])


def test_split_has_classes_of_its_own() -> None:
    made = stream(kind="split")
    assert made.allowed.tolist() == [[c // 2 == t for c in range(CLASSES)] for t in range(3)]
    for part in (made.train, made.test):
        assert torch.equal(part.examples.labels // 2, part.tasks)
    shuffled = stream(kind="split", shuffle_classes=True)
    assert shuffled.allowed.sum(0).tolist() == [1] * CLASSES
    assert shuffled.allowed.sum(1).tolist() == [2] * 3
    assert not torch.equal(shuffled.allowed, made.allowed)
    assert (
        stream(kind="split", tasks=2, classes_per_task=2).allowed.sum().item() == 4
    )  # two classes are left out
    assert stream().allowed.all()


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_exact(quarters: int) -> None:
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # sin and cos of a quarter turn are right to 1e-16.
    torch.testing.assert_close(
        rotated(images, 90.0 * quarters), torch.rot90(images, quarters, (2, 3)), rtol=0, atol=1e-12
    )


def test_an_image_that_is_no_square_is_turned_and_not_sheared() -> None:
    images = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    images[0, 0, 2, 6] = 1  # two to the right of the middle
    turned = rotated(images, 90.0)
    assert turned[0, 0, 0, 4] == pytest.approx(1.0)  # two above it
    assert turned.sum() == pytest.approx(1.0)


def test_a_rotated_stream_turns_a_task_by_its_share_of_half_a_turn() -> None:
    made = stream(kind="rotated", tasks=2, samples=None)
    upright, turned = made.train.examples.inputs.reshape(2, 60, 1, SIDE, SIDE)
    by_row = {int(row.min()): row for row in upright}
    for image in turned:
        torch.testing.assert_close(image, torch.rot90(by_row[int(image.min() + 1e-9)], 1, (1, 2)))


def test_random_angles_are_each_tasks_own() -> None:
    made, longer = (
        stream(kind="rotated", rotation="random", tasks=tasks, samples=None) for tasks in (2, 3)
    )
    assert torch.equal(longer.train.examples.inputs[:120], made.train.examples.inputs)
    angles = [
        np.random.Generator(np.random.PCG64(np.random.SeedSequence((SPEC.seed, 3, t)))).uniform(
            0, 180
        )
        for t in range(3)
    ]
    order = stream(kind="permuted", tasks=3, samples=None)
    rows = rows_of(order, "train").long()
    upright = Rows().examples("train").inputs[rows].reshape(-1, 1, SIDE, SIDE)
    for t, angle in enumerate(angles):
        part = slice(60 * t, 60 * (t + 1))
        wanted = rotated(upright[part], angle).flatten(1)
        torch.testing.assert_close(longer.train.examples.inputs[part], wanted)


def test_grey_levels_stay_grey_levels() -> None:
    class Bytes(Rows):
        def examples(self, part: str) -> Examples:
            generator = torch.Generator().manual_seed(0)
            return Examples(
                torch.randint(0, 256, (60, 16), generator=generator, dtype=torch.uint8),
                torch.arange(60) % CLASSES,
            )

    made = build_stream(Bytes(), dataclasses.replace(SPEC, kind="rotated", samples=None))
    assert made.train.examples.inputs.dtype == torch.uint8
    assert 200 < made.train.examples.inputs.max() <= 255


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"samples": 61},
            DataError,
            r"samples_per_task: task 0 \(classes 0, 1, 2, 3, 4, 5\) wants 61 samples; the train part .* 60",
        ),
        (
            {"kind": "split", "samples": 21},
            DataError,
            r"samples_per_task: task 0 \(classes 0, 1\) wants 21 .* has 20",
        ),
        (
            {"test_samples": 31},
            DataError,
            r"test_samples_per_task: .* wants 31 samples; the test part of the data set has 30",
        ),
        (
            {"kind": "split", "tasks": 4},
            ConfigError,
            "6 classes do not make 4 equal groups.* one of: 2, 3, 6",
        ),
        (
            {"kind": "split", "tasks": 4, "classes_per_task": 2},
            ConfigError,
            "4 tasks of 2 classes want 8 classes; .* has 6",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stream(**changes)


def test_rows_that_are_no_images() -> None:
    class Narrow(Rows):
        features = 15

    class Flat:
        features, classes = SIDE * SIDE, CLASSES  # a square of numbers, but of what?

    rotated_stream = dataclasses.replace(SPEC, kind="rotated")
    with pytest.raises(
        ConfigError, match=r"Narrow\.image_shape is \(1, 4, 4\) and a row has 15 numbers"
    ):
        build_stream(Narrow(), rotated_stream)
    with pytest.raises(
        ConfigError, match="stream: rotated wants pictures; Flat has rows of 16 numbers and no"
    ):
        build_stream(cast(Any, Flat()), rotated_stream)
    assert image_shape(Rows(), "a test") == (1, SIDE, SIDE)


# The data sets


def test_digits_need_no_files() -> None:
    data = Digits()
    data.prepare()
    assert isinstance(data, LabelledArrays)
    assert (data.features, data.classes, data.image_shape) == (64, 10, (1, 8, 8))
    train, test = data.examples("train"), data.examples("test")
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    assert test.labels.bincount().min() > 20


def test_cifar10_rows_have_the_channels_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 5, 4, 3), np.uint8)
    archives.write(
        tmp_path / "cifar10_subset.npz",
        {
            "x_train": x,
            "y_train": np.arange(12, dtype=np.uint8) % 10,
            "x_test": x[:3],
            "y_test": np.arange(3, dtype=np.uint8),
        },
        compress=False,
    )
    data = Cifar10Subset(root=str(tmp_path))
    data.prepare()
    assert data.image_shape == (3, 5, 4)
    row = data.examples("train").inputs[7].reshape(data.image_shape)
    assert torch.equal(row[2], torch.from_numpy(x[7, :, :, 2]))


def test_cifar10_as_shipped() -> None:
    data = Cifar10Subset()
    try:
        data.prepare()
    except DataError as error:
        pytest.skip(str(error))
    assert (data.features, data.classes) == (3072, 10)
    assert data.examples("train").labels.bincount().tolist() == [800] * 10


def test_cifar100_as_torchvision_lays_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    stored = {}
    for part, count in (("train", 200), ("test", 100)):
        stored[part] = rng.integers(0, 256, (count, 3072), np.uint8)
        (folder / part).write_bytes(
            pickle.dumps({"data": stored[part], "fine_labels": [i % 100 for i in range(count)]})
        )
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda *_: True
    )  # these are not the real files
    data = Cifar100(root=str(tmp_path))
    data.prepare()
    assert (data.features, data.classes) == (3072, 100)
    assert torch.equal(data.examples("train").inputs, torch.from_numpy(stored["train"]))
    assert data.examples("test").labels.tolist() == list(range(100))


def test_mini_imagenet_joins_the_three_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Part:
        def __init__(self, classes: list[int]) -> None:
            self.y = np.repeat(classes, 3)[::-1].copy()
            self.x = torch.arange(len(self.y), dtype=torch.float32)[:, None, None, None].expand(
                -1, 3, 84, 84
            )

    class Split:
        def __init__(self, classes: list[int]) -> None:
            self.dataset = Part(classes)

    for mode in ("train", "validation", "test"):
        (tmp_path / f"mini-imagenet-cache-{mode}.pkl").touch()
    splits = {"train": Split([0, 5]), "validation": Split([0]), "test": Split([2, 3])}
    monkeypatch.setattr(image_sets, "load_learn2learn", lambda benchmark, folder: splits)
    monkeypatch.setattr(image_sets, "MINI_TEST_PER_CLASS", 1)
    data = MiniImagenet(root=str(tmp_path), trust_pickles=True)
    assert (data.classes, data.image_shape) == (5, (3, 84, 84))
    train, test = data.examples("train"), data.examples("test")
    assert train.labels.bincount().tolist() == [2] * 5
    assert test.labels.bincount().tolist() == [1] * 5
    assert test.inputs[:, 0].tolist() == [
        2,
        5,
        2,
        2,
        5,
    ]  # the last of its class, in the order of the files
    assert test.labels.tolist() == [1, 0, 2, 4, 3]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Cifar10Subset, r"cifar10_subset\.npz does not exist"),
        (Cifar100, "torchvision finds no whole CIFAR-100 in .*bomemeta data prepare cifar100"),
        (MiniImagenet, "data.trust_pickles: true"),
    ],
)
def test_missing_files_say_how_to_get_them(kind: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        kind(root=str(tmp_path)).prepare()
    if kind is MiniImagenet:
        with pytest.raises(
            DataError,
            match=r"has no mini-imagenet-cache-train\.pkl.*bomemeta data prepare learn2learn/mini-imagenet",
        ):
            kind(root=str(tmp_path), trust_pickles=True).prepare()
