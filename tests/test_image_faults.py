"""Image files, CSV files and caches with a fault: named, and what is sound is read all the same."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_folder import folder, photo

from bomemeta.data.augmentation import augmented
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.data.episodes_from import EpisodesFrom
from bomemeta.data.image_folder import ImageFolder
from bomemeta.data.preprocessing import Preprocessing
from bomemeta.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMEMETA_CACHE", str(tmp_path / "cache"))


def declared(path: Path, width: int, height: int) -> Path:
    """A PNG that says this size and has nothing behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
            for kind, part in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
        )
    )
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are files on Unix alone")
def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 6)
    os.mkfifo(root / "class0" / "pipe.png")
    (root / "class1" / "zero.png").symlink_to("/dev/zero")
    (root / "class2" / "loop.png").symlink_to("loop.png")
    data = ImageFolder(str(root), size=16)
    assert data.count == 24
    (note,) = data.notes
    assert note.startswith("3 files cannot be read and are left out")
    assert "class0/pipe.png (a folder, a pipe or a device; wanted a file)" in note
    with pytest.raises(DataError, match=r"zero.png cannot be read: a folder, a pipe"):
        Preprocessing(channels=3, height=8, width=8)([root / "class1" / "zero.png"])


def test_a_picture_larger_than_the_memory_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "root", 6)
    declared(root / "class0" / "big.png", 9000, 9000)
    declared(root / "class1" / "bomb.png", 60000, 60000)
    monkeypatch.setattr("bomemeta.data.image_decoding.available_memory", lambda: 10**8)
    (note,) = ImageFolder(str(root), size=16).notes
    assert "class0/big.png (it says that it is 9000 x 9000 pixels, which takes 648 MB; this" in note
    assert "class1/bomb.png (DecompressionBombError: Image size (3600000000 pixels)" in note


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("~nosuchuser/a.png,x", r"list.csv:3: got '~nosuchuser/a.png'; this machine knows no user"),
        ("a\0b.png,x", "(NUL byte|line contains NUL)"),
        ("s3://bucket/a.png,x", r"list.csv:3: got 's3://bucket/a.png', a URI"),
        ("y" * 300 + ".png,x", "a path has at most"),
        (",x", "list.csv:3: no path or no label"),
        ("a.png", "list.csv:3: no path or no label"),
        ("z" * 200_000 + ",x", "field larger than field limit"),
    ],
    ids=range(7),
)
def test_a_line_of_a_csv_is_named(line: str, message: str, tmp_path: Path) -> None:
    photo(tmp_path / "0.png", 0)
    (tmp_path / "list.csv").write_bytes(f"path,label\n0.png,x\n{line}\n".encode())
    with pytest.raises(DataError, match=message):
        ImageFolder(str(tmp_path / "list.csv"), size=16).prepare()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_csv_of_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path,label\n\u00e9.png,x\n".encode(encoding))
    with pytest.raises(DataError, match=r"list.csv is not a readable CSV file in UTF-8"):
        ImageFolder(str(tmp_path / "list.csv"), size=16).prepare()


def test_a_dollar_in_a_picture_s_name_is_a_letter(tmp_path: Path) -> None:
    names = ["$HOME.png", "${a}.png", "b$c.png"]
    for i, name in enumerate(names):
        photo(tmp_path / name, i)
    lines = "\n".join(f"{name},{i}" for i, name in enumerate(names))
    (tmp_path / "list.csv").write_text(f"path,label\n{lines}\n")
    assert ImageFolder(str(tmp_path / "list.csv"), size=16).count == 3


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"unreadable": [[0]]}', b'{"unreadable": [[0, "x"]]}', b"\xff"]
)  # fmt: skip
def test_a_damaged_cache_is_named_and_a_damaged_index_made_again(
    content: bytes, tmp_path: Path
) -> None:
    root = folder(tmp_path / "root", 6)
    ImageFolder(str(root), size=16).prepare()
    (index,) = (tmp_path / "cache" / "images").glob("index-*.json")
    index.write_bytes(content)
    ImageFolder(str(root), size=16).prepare()
    (rows,) = (tmp_path / "cache" / "images").glob("*/rows.json")
    rows.write_bytes(content)
    with pytest.raises(DataError, match=r"the cache .* is damaged .*Delete it: it is made again"):
        ImageFolder(str(root), size=16).prepare()


def test_a_folder_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "caf\udce9", 3)
    assert ImageFolder(str(root), size=16).count == 12


class Items(list[Any]):
    def __getitem__(self, i: Any) -> Any:
        found = super().__getitem__(i)
        if isinstance(found, Exception):
            raise found
        return found


IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (KeyError("gone"), "item 1: KeyError: 'gone'"),
        ((IMAGE, [1]), "the label of item 1: TypeError: unhashable"),
        ((IMAGE, float("nan")), "the label of item 1: got nan"),
        ((IMAGE, object()), "the label of item 1: got <object"),
        ((IMAGE, torch.tensor([1, 2])), "item 1: RuntimeError"),
        ((IMAGE, True), "labels: 1, True are equal in Python"),
        ((IMAGE, (1, None)), "the labels cannot be sorted"),
        ((torch.rand(3, 8, 8, device="meta"), 1), "the image of item 1: got Tensor, no array"),
        ((IMAGE[:0], 1), r"the image of item 1: got an array of shape \(0, 8, 3\)"),
        ((IMAGE / np.float64("nan"), 1), "the image of item 1: got floats"),
    ],
    ids=range(10),
)
def test_an_item_that_is_odd_is_named(item: Any, message: str) -> None:
    made = Items([(IMAGE, 1), item, (IMAGE, (1, 2)), (IMAGE, 3)])
    with pytest.raises(DataError, match=rf"^EpisodesFrom: {message}"), np.errstate(all="ignore"):
        EpisodesFrom(made, size=8).prepare()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, "size: got 0; wanted a whole number >= 1"),
        ({"channels": 2}, "channels: got 2; wanted 1 or 3"),
        ({"resize": "zoom"}, "resize: got 'zoom'"),
        ({"split": [0, 0, 0]}, r"split: got \[0, 0, 0\]; wanted three shares"),
        ({"mean": (0.5,), "std": (1,)}, "mean and std: got"),
        ({"mean": (0.5,) * 3, "std": (0,) * 3}, "mean and std: got"),
        ({"augmentation": 3}, "augmentation: got 3; wanted a function"),
    ],
    ids=range(7),
)
def test_fields_that_are_odd_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^EpisodesFrom: {message}"):
        EpisodesFrom([(IMAGE, 0)], **keys)


def test_more_images_than_there_is_memory_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bomemeta.data.episodes_from.available_memory", lambda: 100)
    with pytest.raises(
        DataError, match=r"1 images of 3 x 8 x 8 take 192 B; this machine has 100 B"
    ):
        EpisodesFrom([(IMAGE, 0)], size=8).prepare()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image[:1], r"gave torch.uint8 \[1, 8, 8\] for uint8 \[3, 8, 8\]"),
        (lambda image: image / 255, r"gave torch.float32 \[3, 8, 8\]"),
        (lambda image: image.numpy(), "gave ndarray for uint8"),
        (lambda image: {}["x"], r"on an image, uint8 \[3, 8, 8\], it failed: KeyError"),
    ],
    ids=range(4),
)
def test_an_augmentation_gives_an_image_of_the_same_form(transform: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        augmented(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), transform, 0)


def test_what_is_sound_beside_it_is_read_as_it_is(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 6, 3)
    (root / "class3" / "cut.png").write_bytes(photo(tmp_path / "x.png", 1).read_bytes()[:200])
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    (root / "deep").mkdir()
    Image.fromarray(deep).save(root / "deep" / "0.png")
    data = ImageFolder(str(root), size=8, split={"train": ["deep"], "test": ["class3"]})
    data.prepare()
    rows = data.table.splits
    assert (rows["train"].count.tolist(), rows["test"].count.tolist()) == ([1], [3])
    wanted = np.round(deep / 257).astype(np.uint8)
    assert np.array_equal(data.table.images[int(rows["train"].start[0])][0], wanted)
    data.check("test", EpisodeSpec(1, 1, 1))
