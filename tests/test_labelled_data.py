"""Labelled arrays keep their pictures' shape and their classes, whatever they are called."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bomemeta
from bomemeta.data.labelled import LabelledArray
from bomemeta.data.pictures import Picture, picture_of, picture_of_row
from bomemeta.data.streams import StreamSpec, build_stream
from bomemeta.errors import ConfigError, DataError

N = 24
LABELS = np.arange(N) % 2


def saved(folder: Path, pictures: np.ndarray, labels: Any = LABELS, **changes: Any) -> str:
    path = folder / "data.npz"
    arrays = {"x_train": pictures, "y_train": labels, "x_test": pictures, "y_test": labels}
    np.savez(path, **{**arrays, **changes})
    return str(path)


def drawn(*shape: int) -> np.ndarray:
    """Pictures of smooth shapes, which a wrong fold would scramble."""
    return np.random.default_rng(0).integers(0, 256, (N, *shape), dtype=np.uint8)


# Pictures


@pytest.mark.parametrize(
    ("row", "channels", "picture"),
    [
        ((28, 28), None, Picture(1, 28, 28)),
        ((8, 32), None, Picture(1, 8, 32)),
        ((32, 32, 3), None, Picture(3, 32, 32, True)),
        ((16, 16, 4), None, Picture(4, 16, 16, True)),
        ((28, 28, 1), None, Picture(1, 28, 28, True)),
        ((3, 32, 32), None, Picture(3, 32, 32)),
        ((1, 8, 32), None, Picture(1, 8, 32)),
        ((10, 16, 16), "first", Picture(10, 16, 16)),
        ((4, 4, 4), "last", Picture(4, 4, 4, True)),
        ((4, 4, 3), None, "which axis has the channels is not known"),
        ((10, 16, 16), None, "which axis has the channels is not known"),
        ((256,), None, "its height and width are not known"),
        ((2, 3, 4, 5), None, "its height and width are not known"),
    ],
)
def test_which_picture_a_row_is(row, channels, picture):
    found = picture_of_row(row, channels)
    if isinstance(picture, str):
        assert isinstance(found, str)
        assert picture in found
    else:
        assert found == picture
        rows = torch.arange(2 * int(np.prod(row))).reshape(2, -1)
        assert torch.equal(picture.flat(picture.fold(rows)), rows)


@pytest.mark.parametrize(
    "shape",
    [(16, 16), (8, 32), (16, 16, 1), (16, 16, 3), (16, 16, 4), (8, 32, 3), (3, 16, 16), (4, 8, 32)],
)
def test_a_rotated_stream_turns_pictures_of_every_shape(shape, tmp_path):
    """A quarter of a turn is exact where the picture is square; where it is not, what does not leave
    the picture is.
    """
    pictures = drawn(*shape)
    data = LabelledArray(path=saved(tmp_path, pictures))
    spec = StreamSpec(
        kind="rotated", tasks=2, samples=10, test_samples=10, classes_per_task=None,
        shuffle_classes=False, seed=0,
    )  # fmt: skip
    made = build_stream(data, spec)
    start = made.train.starts[1]
    drawn_rows = np.random.Generator(np.random.PCG64(np.random.SeedSequence((0, 0, False, 1))))
    chosen = drawn_rows.permutation(N)[:10]
    first = shape[0] in (3, 4)
    axes = (2, 3) if first else (1, 2)
    for got, original in zip(
        made.train.examples.inputs[start:].numpy(), pictures[chosen], strict=True
    ):
        got, original = got.reshape(1, *shape), original[None]
        height, width = (original.shape[axis] for axis in axes)
        if height == width:
            assert np.array_equal(got, np.rot90(original, 1, axes=axes))
            continue
        side = min(height, width)

        def middle(picture: np.ndarray, side: int = side) -> np.ndarray:
            for axis in axes:
                least = (picture.shape[axis] - side) // 2
                picture = np.take(picture, range(least, least + side), axis)
            return picture

        assert np.array_equal(middle(got), np.rot90(middle(original), 1, axes=axes))


def test_flat_rows_want_a_key_where_a_picture_is_needed(tmp_path):
    path = saved(tmp_path, drawn(16, 16).reshape(N, -1))
    with pytest.raises(
        ConfigError, match=r"LabelledArray: a row is \[256\].* Set data\.image_shape"
    ):
        picture_of(LabelledArray(path=path), "problem.stream: rotated")
    assert picture_of(LabelledArray(path=path, image_shape=(16, 16)), "x") == (1, 16, 16, False)
    assert picture_of(LabelledArray(path=path, image_shape=(8, 8, 4)), "x") == (4, 8, 8, True)
    with pytest.raises(DataError, match=r"data\.image_shape: got \[16, 15\]; .* is \[256\]"):
        LabelledArray(path=path, image_shape=(16, 15)).prepare()
    path = saved(tmp_path, drawn(4, 4, 3))
    with pytest.raises(ConfigError, match=r"\[4, 4, 3\].*data\.channels=first or last"):
        picture_of(LabelledArray(path=path), "x")
    assert picture_of(LabelledArray(path=path, channels="last"), "x") == (3, 4, 4, True)
    with pytest.raises(DataError, match=r"data\.image_shape: got \[12, 4\]; .*\[4, 4, 3\]"):
        LabelledArray(path=path, image_shape=(12, 4)).prepare()


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (16, 16, 3), (16, 16, 4), (3, 16, 16)])
def test_resnet18_sees_the_picture(shape, tmp_path):
    """The network on rows is the network on the pictures, folded by hand."""
    from bomemeta.nets.controller import ReducedResNet18

    pictures = drawn(*shape)
    data = LabelledArray(path=saved(tmp_path, pictures))
    picture = picture_of(data, "x")
    net = ReducedResNet18(
        channels=picture.channels, height=picture.height, width=picture.width, filters=4, classes=2,
        channels_last=picture.channels_last,
    )  # fmt: skip
    params = net.initial(torch.Generator().manual_seed(0))
    rows = data.examples("train").inputs[:3].double()
    by_hand = torch.from_numpy(pictures[:3]).double()
    if len(shape) == 2:
        by_hand = by_hand[:, None]
    elif picture.channels_last:
        by_hand = by_hand.permute(0, 3, 1, 2)
    plain = ReducedResNet18(
        channels=by_hand.shape[1], height=by_hand.shape[2], width=by_hand.shape[3], filters=4,
        classes=2,
    )  # fmt: skip
    assert torch.equal(net.logits(params, rows, []), plain.logits(params, by_hand.flatten(1), []))


# Labels

KINDS: dict[str, Any] = {
    "gaps": [3, 7],
    "one-based": [1, 2],
    "negative": [-5, -1],
    "texts": ["cat", "dog"],
    "bytes": [b"cat", b"dog"],
    "truth": [False, True],
    "floats": [0.0, 1.0],
    "halves": np.array([2, 9], np.float16),
    "uint64": np.array([5, 2**64 - 1], np.uint64),
    "huge": np.array([0, 2**62], np.int64),
    "small": np.array([0, 255], np.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_kind_are_the_classes_from_0(kind, tmp_path):
    names = np.asarray(KINDS[kind])
    data = LabelledArray(path=saved(tmp_path, drawn(4), names[LABELS]))
    assert data.classes == 2
    wanted = [name.decode() if isinstance(name, bytes) else name for name in names.tolist()]
    assert list(data.class_names) == wanted
    for part in ("train", "test"):
        labels = data.examples(part).labels
        assert labels.dtype == torch.int64
        assert labels.tolist() == LABELS.tolist()


def test_uint64_and_int64_labels_are_compared_exactly(tmp_path):
    train = np.array([2**63, 2**63 + 1], np.uint64)[LABELS]
    data = LabelledArray(path=saved(tmp_path, drawn(4), train))
    assert data.class_names == (2**63, 2**63 + 1)
    with pytest.raises(DataError, match=r"y_test has 1 class that y_train has not: 5 \(24 rows\)"):
        LabelledArray(
            path=saved(tmp_path, drawn(4), train, y_test=np.full(N, 5, np.int64))
        ).prepare()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 0.5, r"y_train has a label 0.5 in row 0 \(float64\)"),
        (np.where(LABELS, np.nan, 0.0), "y_train has a label nan in row 1"),
        (np.where(LABELS, 1e300, 0.0), r"y_train has a label 1e\+300 in row 1"),
        (LABELS.astype(complex), "y_train is complex128"),
        (LABELS.astype("M8[s]"), r"y_train is datetime64\[s\]"),
        (np.zeros(N, int), "y_train has one class alone, 0"),
        (np.full(N, "cat"), "y_train has one class alone, 'cat'"),
        (np.eye(2)[LABELS], r"y_train is float64 \[24, 2\] for 24 rows"),
        (np.full(N, b"\xff"), "y_train has a text that is no UTF-8"),
    ],
)
def test_what_is_no_label_is_refused_by_name(labels, message, tmp_path):
    with pytest.raises(DataError, match=message):
        LabelledArray(path=saved(tmp_path, drawn(4), labels)).prepare()


def test_classes_of_the_test_part_alone(tmp_path):
    test = LABELS.copy()
    test[:3] = 9
    path = saved(tmp_path, drawn(4), y_test=test)
    with pytest.raises(
        DataError,
        match=r"y_test has 1 class that y_train has not: 9 \(3 rows\)\. y_train has 0, 1\.",
    ):
        LabelledArray(path=path).prepare()
    left = LabelledArray(path=path, test_only_classes="drop")
    assert left.classes == 2
    assert left.examples("test").labels.tolist() == LABELS[3:].tolist()
    assert torch.equal(left.examples("test").inputs, torch.from_numpy(drawn(4)[3:]))
    with pytest.raises(DataError, match="and no row of another class"):
        LabelledArray(
            path=saved(tmp_path, drawn(4), y_test=np.full(N, 9)), test_only_classes="drop"
        ).prepare()
    with pytest.raises(DataError, match=r"y_train has numbers \(0 \.\.\.\) and y_test texts \('a'"):
        LabelledArray(path=saved(tmp_path, drawn(4), y_test=np.full(N, "a"))).prepare()


@pytest.mark.parametrize("corruption", ["redraw", "shift"])
def test_hyper_cleaning_of_other_names_is_the_same_run(corruption, tmp_path):
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((N, 4)).astype(np.float32)
    config = {
        "problem": {"name": "hyper_cleaning", "train": 12, "validation": 6, "selection": 3, "corruption": corruption},
        "solver": {"name": "bome", "inner_steps": 2}, "steps": 3, "log": {"tensorboard": False},
    }  # fmt: skip
    results = []
    for number, names in enumerate(([0, 1], [3, 7], ["a", "b"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        config["data"] = {
            "dataset": "labelled_array",
            "path": saved(folder, inputs, np.array(names)[LABELS]),
        }
        results.append(bomemeta.train(config, [f"output_dir={folder / 'run'}"]))
        record = json.loads((folder / "run" / "result.json").read_text())
        assert record["data"]["classes"] == names
    assert len({result.upper_sha256 for result in results}) == 1
    assert results[0].metrics == results[1].metrics == results[2].metrics


def test_chance_of_a_stream_counts_the_classes_there_are(tmp_path):
    config = {
        "problem": {
            "name": "continual", "tasks": 2, "samples_per_task": 20, "test_samples_per_task": 10,
            "hidden": 4, "layers": 1, "method": "plain", "objective": "er",
        },
        "solver": {"name": "lower_only", "inner_lr": 0.05}, "log": {"tensorboard": False},
    }  # fmt: skip
    found = []
    for number, names in enumerate(([0, 1], [3, 7], [-1, 2**40])):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = saved(folder, drawn(4), np.array(names)[LABELS])
        config["data"] = {"dataset": "labelled_array", "path": path}
        found.append(bomemeta.train(config, [f"output_dir={folder / 'run'}"]).metrics)
    assert found[0]["fwt"] == found[1]["fwt"] == found[2]["fwt"]


def test_a_data_set_travels_without_its_rows(tmp_path):
    data = LabelledArray(path=saved(tmp_path, drawn(64, 64)))
    data.prepare()
    assert len(pickle.dumps(data)) < 1000
    assert pickle.loads(pickle.dumps(data)) == data
