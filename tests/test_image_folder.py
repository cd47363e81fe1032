"""Folders of photographs as people have them: every layout and mode, and every fault."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bomemeta
from bomemeta.data import image_cache
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.data.episodes_from import EpisodesFrom
from bomemeta.data.image_folder import ImageFolder
from bomemeta.data.preprocessing import Preprocessing
from bomemeta.errors import ConfigError, DataError

SPEC = EpisodeSpec(2, 1, 2)
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMEMETA_CACHE", str(tmp_path / "cache"))


def photo(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
    """A file whose noise follows from `seed`."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if mode == "RGB" else image.convert(mode)).save(path)
    return path


def folder(root: Path, classes: int = 8, each: int = 4, below: str = "") -> Path:
    for c in range(classes):
        for i in range(each):
            photo(root / below / f"class{c}" / f"{i}.jpg", 100 * c + i)
    return root


def names(data: ImageFolder) -> dict[str, set[str]]:
    return {split: set(data.table.splits[split].names) for split in SPLITS}


def test_classes_are_split_by_the_seed_and_never_overlap(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 20)
    drawn = [names(ImageFolder(root, size=16, split_seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for split in drawn:
        assert [len(split[name]) for name in SPLITS] == [12, 4, 4]
        assert len(set.union(*split.values())) == 20
    halves = names(ImageFolder(root, size=16, split=[0.5, 0.25, 0.25]))
    assert [len(halves[name]) for name in SPLITS] == [10, 5, 5]


def test_lists_give_the_split(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 5)
    lists = {"train": ["class3", "class1"], "validation": ["class0"], "test": ["class4"]}
    data = ImageFolder(root, size=16, split=lists)
    assert names(data) == {split: set(classes) for split, classes in lists.items()}
    assert data.notes == ("1 classes are in no list of data.split: class2",)
    for bad, match in (
        ({"train": ["clas3"]}, "data.split.train: there is no class 'clas3'.* Did you mean class3"),
        ({"train": ["class3"], "test": ["class3"]}, "class 'class3' is in train and in test"),
    ):
        with pytest.raises(DataError, match=match):
            ImageFolder(root, size=16, split=bad).prepare()


def test_split_folders_and_csv_give_the_same_images(tmp_path: Path) -> None:
    root = tmp_path / "root"
    lines = ["path,label,split"]
    for split, word, classes in (
        ("train", "train", 3),
        ("validation", "val", 2),
        ("test", "test", 2),
    ):
        for c in range(classes):
            for i in range(3):
                path = photo(root / word / f"{split}{c}" / f"{i}.png", hash((split, c, i)) % 2**31)
                lines.append(f"{path.relative_to(root)},{split}{c},{split}")
    (root.parent / "list.csv").write_text(
        "\n".join(lines)
        .replace("train/", "root/train/")
        .replace("val/", "root/val/")
        .replace("test/", "root/test/")
    )
    folders, table = (ImageFolder(path, size=16) for path in (root, root.parent / "list.csv"))
    assert names(folders) == names(table)
    assert {split: len(found) for split, found in names(folders).items()} == {
        "train": 3, "validation": 2, "test": 2,
    }  # fmt: skip
    assert np.array_equal(folders.table.images, table.table.images)
    assert folders.digest == table.digest  # the same content: the same cache


def test_a_class_in_two_split_folders_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder(tmp_path / "root", 2, below=split)
    with pytest.raises(
        DataError, match=r"class0, class1 are classes of the .* split and of another"
    ):
        ImageFolder(tmp_path / "root").prepare()


def test_a_missing_validation_split_is_drawn_from_the_training_classes(tmp_path: Path) -> None:
    folder(tmp_path / "root", 10, below="train")
    photo(tmp_path / "root/test/other/1.jpg", 7)
    data = ImageFolder(tmp_path / "root", size=16)
    assert {split: len(found) for split, found in names(data).items()} == {
        "train": 8, "validation": 2, "test": 1,
    }  # fmt: skip
    assert data.notes == (
        "there is no validation split: 2 training classes are drawn for it (a fifth)",
    )


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 4)
    photo(root / "train/locomotive.jpg", 5)
    assert set.union(*names(ImageFolder(root, size=16)).values()) == {
        "train", *(f"class{c}" for c in range(4)),
    }  # fmt: skip
    photo(root / "train/deep/1.jpg", 6)
    with pytest.raises(
        DataError, match=r"has a train folder with class folders, and beside it class0"
    ):
        ImageFolder(root, size=16).prepare()


def one(path: Path, **keys: object) -> np.ndarray:
    """The only image of a folder, as it is in the cache: uint8 [C, 16, 16]."""
    lists = {"train": [path.parent.name]}
    data = ImageFolder(path.parent.parent, size=16, split=lists, **keys)  # type: ignore[arg-type]
    (image,) = data.table.images
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path: Path, kind: str, channels: int) -> None:
    """A left half of 200 and a right half of 50 (of 255 and 0 with one bit) is seen in every mode."""
    grey = np.full((20, 20), 200, np.uint8)
    grey[:, 10:] = 50
    path = tmp_path / "root" / "c" / f"x.{'tif' if kind in ('CMYK', 'YCbCr') else 'png'}"
    path.parent.mkdir(parents=True)
    if kind == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(grey).convert("RGB" if kind in ("CMYK", "YCbCr") else "L").convert(
            kind
        ).save(path)
    image = one(path, channels=channels)
    assert image.shape == (channels, 16, 16)
    left, right = image[:, :, :6].astype(int), image[:, :, 10:].astype(int)
    if kind == "1":  # dithered
        assert left.mean() > 150
        assert right.mean() < 100
    else:
        # rounding of colour spaces: two levels
        assert np.abs(left - 200).max() <= 2
        assert np.abs(right - 50).max() <= 2


def test_transparent_is_white_and_exif_turns(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    path = tmp_path / "a" / "c" / "x.png"
    path.parent.mkdir(parents=True)
    clear.save(path)
    assert (one(path) == 255).all()
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 255  # the upper half is white
    path = tmp_path / "b" / "c" / "x.jpg"
    path.parent.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees: what is above goes to the right
    Image.fromarray(half).save(path, exif=exif, quality=95)
    turned = one(path)[0].astype(int)
    assert turned[:, :6].max() < 40
    assert turned[:, 10:].min() > 215


def test_resize_modes(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10] = 255  # the left third
    path = tmp_path / "root" / "c" / "x.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(wide).save(path)
    assert one(path, resize="crop").mean() < 5  # the middle third alone, smoothed at its edge
    assert abs(one(path, resize="stretch").mean() / 255 - 1 / 3) < 0.02
    assert abs(one(path, resize="pad").mean() / 255 - 1 / 9) < 0.04


def test_what_people_s_folders_have(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 6)
    (root / "class0" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (root / "class0" / ".hidden.jpg").write_bytes(b"")
    (root / "class0" / "Thumbs.db").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "empty").mkdir()
    photo(root / "loose.jpg", 1)
    photo(root / "class1" / "deep" / "x.jpg", 9001)
    os.symlink(root / "class1", root / "class1" / "deep" / "circle")
    os.symlink(root / "nowhere.jpg", root / "class2" / "lost.jpg")
    (root / "class3" / "copy.jpg").write_bytes((root / "class3" / "0.jpg").read_bytes())
    (root / "class4" / "other.jpg").write_bytes((root / "class5" / "0.jpg").read_bytes())
    data = ImageFolder(root, size=16)
    count = {
        name: int(n)
        for rows in data.table.splits.values()
        for name, n in zip(rows.names, rows.count, strict=True)
    }
    assert count == {"class0": 4, "class1": 5, "class2": 4, "class3": 4, "class4": 4, "class5": 3}
    notes = "\n".join(data.notes)
    for part in (
        "classes without images are left out: empty",
        "1 images lie in",
        "class class1 has 1 images in folders of its own",
        "2 files cannot be read and are left out: class0/broken.jpg (",
        "class2/lost.jpg (",
        "2 files are the same image in two classes and are left out: class4/other.jpg, class5/0.jpg",
        "1 files are copies of others of their class and are left out: class3/copy.jpg",
    ):
        assert part in notes
    assert len(ImageFolder(root, size=16, duplicates="keep").table.images) == 4 * 6 + 3
    with pytest.raises(DataError, match=r"3 files are copies of others"):
        ImageFolder(root, size=16, duplicates="error").prepare()


def test_small_classes_are_dropped_or_an_error(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 4)
    photo(root / "small" / "1.jpg", 77)
    lists = {"train": ["class0", "class1", "class2", "small"], "test": ["class3"]}
    data = ImageFolder(root, size=16, split=lists)
    data.check("train", SPEC)
    assert data.small_notes("train", SPEC) == [
        "1 classes (train) have fewer than the 3 images that shots + queries needs and are not drawn: small (1)"
    ]
    assert data.small_notes("test", SPEC) == []
    row = int(
        data.table.splits["train"].start[list(data.table.splits["train"].names).index("small")]
    )
    for task in range(30):
        draw = data.rows("train", SPEC, (0, 0, task))
        assert row not in draw.support
        assert not set(draw.support.ravel()) & set(draw.query.ravel())
    with pytest.raises(
        DataError, match=r"the train split has 3 classes with the 3 images .* small \(1\)"
    ):
        data.check("train", EpisodeSpec(4, 1, 2))
    with pytest.raises(DataError, match=r"1 classes \(train\) have fewer"):
        ImageFolder(root, size=16, split=lists, small_classes="error").check("train", SPEC)
    with pytest.raises(
        DataError,
        match=r"the test split has 1 classes; problem.ways is 2: lower it, or .* data\.split \(now train \d+, validation \d+, test 1\)",
    ):
        data.check("test", SPEC)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist"):
        ImageFolder(tmp_path / "no").prepare()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no images in class folders. Wanted"):
        ImageFolder(tmp_path / "empty").prepare()
    (tmp_path / "bad" / "c").mkdir(parents=True)
    (tmp_path / "bad" / "c" / "x.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no image in .* can be read"):
        ImageFolder(tmp_path / "bad").prepare()
    (tmp_path / "list.csv").write_text("file,class\na,b\n")
    with pytest.raises(DataError, match=r"columns path and label .*; got file, class"):
        ImageFolder(tmp_path / "list.csv").prepare()
    (tmp_path / "list.csv").write_text("path,label,split\na.jpg,b,train\nc.jpg,b,test\n")
    with pytest.raises(
        DataError, match=r"list.csv:3: class 'b' is in test here and in train above"
    ):
        ImageFolder(tmp_path / "list.csv").prepare()


def test_normalisation(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 4)
    lists = {"train": ["class0", "class1"], "validation": ["class2"], "test": ["class3"]}
    data = ImageFolder(root, size=16, split=lists, normalisation="training")
    rows = data.table.splits["train"]
    train = data.images(np.concatenate([np.arange(a, a + 4) for a in rows.start]))
    assert torch.allclose(train.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(train.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4)
    given = ImageFolder(root, size=16, normalisation={"mean": [0.5] * 3, "std": [0.25] * 3})
    plain = ImageFolder(root, size=16)
    assert torch.allclose(given.images(np.arange(3)), (plain.images(np.arange(3)) - 0.5) / 0.25)
    for keys, match in (
        ({"normalisation": {"mean": [0.5], "std": [1.0]}}, "each of 3 numbers"),
        ({"normalisation": "imagenet", "channels": 1}, "imagenet is of three channels"),
        ({"split": [0.0, 0.0, 0.0]}, "wanted three shares"),
    ):
        with pytest.raises(ConfigError, match=match):
            ImageFolder(root, **keys)


def test_preprocessing_is_that_of_training(tmp_path: Path) -> None:
    """A path, bytes, a Pillow image and an array of a training image give what training saw."""
    root = folder(tmp_path / "root", 4)
    data = ImageFolder(root, size=16, normalisation="imagenet")
    path = root / "class0" / "0.jpg"
    row = int(data.table.splits[next(s for s in SPLITS if "class0" in names(data)[s])].start[
        list(data.table.splits[next(s for s in SPLITS if "class0" in names(data)[s])].names).index("class0")
    ])  # fmt: skip
    wanted = data.images(np.array([row]))
    again = Preprocessing.from_dict(data.preprocessing.to_dict())
    assert again == data.preprocessing
    with Image.open(path) as image:
        array = np.asarray(image)
        for given in (
            path,
            str(path),
            path.read_bytes(),
            image,
            array,
            torch.tensor(array).permute(2, 0, 1),
        ):
            assert torch.equal(again([given]), wanted)
    with pytest.raises(DataError, match=r"image 1 cannot be read: got an array of shape"):
        again([path, np.zeros((3, 4, 5, 6), np.uint8)])
    with pytest.raises(DataError, match=r"nothing.jpg cannot be read"):
        again([root / "nothing.jpg"])


def test_augmentation_follows_from_the_key_and_leaves_torch_s_generator(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 12)
    data, plain = (ImageFolder(root, size=16, augmentation=name) for name in ("colour", "none"))
    before = torch.get_rng_state()
    first, again = (data.episode("train", SPEC, (0, 0, 3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.support, again.support)
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.query, plain.episode("train", SPEC, (0, 0, 3)).query)
    # the same images are drawn, and those of the test classes are left as they are
    for a, b in zip(
        data.episode("test", SPEC, (0, 2, 3)), plain.episode("test", SPEC, (0, 2, 3)), strict=True
    ):
        assert torch.equal(a, b)


def _images_digest(root: str, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    data = ImageFolder(root, size=16)
    queue.put((data.digest, int(data.table.images.astype(np.int64).sum())))


def test_processes_that_start_at_once_share_one_cache(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", 30)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_images_digest, args=(str(root), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    caches = [path for path in (tmp_path / "cache" / "images").iterdir() if path.is_dir()]
    assert len(caches) == 1
    assert isinstance(ImageFolder(root, size=16).table.images, np.memmap)


def test_the_cache_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "root", 4)
    first = ImageFolder(root, size=16)
    first.prepare()
    decoded: list[Path] = []
    original = image_cache._decoded
    monkeypatch.setattr(
        image_cache, "_decoded", lambda path, *rest: decoded.append(path) or original(path, *rest)
    )
    assert ImageFolder(root, size=16).digest == first.digest
    root.rename(tmp_path / "moved")
    assert ImageFolder(tmp_path / "moved", size=16).digest == first.digest
    assert decoded == []
    photo(tmp_path / "moved" / "class0" / "0.jpg", 4711)
    os.utime(tmp_path / "moved" / "class0" / "0.jpg", ns=(1, 1))  # whatever the clock says
    assert ImageFolder(tmp_path / "moved", size=16).digest != first.digest
    assert len(decoded) == 16
    assert ImageFolder(tmp_path / "moved", size=20).digest != first.digest


def test_a_pickled_data_set_carries_no_images(tmp_path: Path) -> None:
    data = ImageFolder(folder(tmp_path / "root", 12), size=16)
    data.check("train", SPEC)
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    a, b = (d.episode("train", SPEC, (0, 0, 1)) for d in (data, pickle.loads(sent)))
    assert torch.equal(a.support, b.support)


def test_ten_thousand_classes(tmp_path: Path) -> None:
    """From a list, because ten thousand folders take longer to make than to read."""
    photo(tmp_path / "x.png", 1, size=(8, 8))
    rows = [f"x.png,{c:05}" for c in range(10_000)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    data = ImageFolder(tmp_path / "list.csv", size=8, duplicates="keep")
    assert sum(len(rows.count) for rows in data.table.splits.values()) == 10_000
    with pytest.raises(DataError, match=r"has 0 classes with the 2 images"):
        data.check("train", EpisodeSpec(5, 1, 1))


class Pairs:
    """A map-style data set of a user's own."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> object:
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
        label = f"class{i % 6}"
        if self.kind == "pil":
            return Image.fromarray(pixels), label
        if self.kind == "tensor":
            return torch.tensor(pixels).permute(2, 0, 1).float() / 255, label
        return {"image": pixels, "label": label}


def test_episodes_from_any_map_style_data_set() -> None:
    sets = [
        EpisodesFrom(Pairs(kind), size=16, split=[1 / 3] * 3) for kind in ("pil", "tensor", "array")
    ]
    episodes = [data.episode("train", SPEC, (0, 0, 5)) for data in sets]
    assert episodes[0].support.shape == (2, 3, 16, 16)
    for other in episodes[1:]:
        assert torch.equal(other.support, episodes[0].support)
        assert torch.equal(other.query, episodes[0].query)
    lists = {"train": ["class5", "class0"], "test": ["class1"]}
    data = EpisodesFrom(Pairs("pil"), size=16, split=lists)
    assert list(data.table.splits["train"].names) == ["class0", "class5"]
    for bad in ({"train": ["class9"]}, {"train": ["class1"], "test": ["class1"]}):
        with pytest.raises(DataError, match=r"wanted labels of the data set"):
            EpisodesFrom(Pairs("pil"), split=bad).prepare()


def test_episodes_from_says_what_is_wrong_with_an_item() -> None:
    for items, match in (
        ([], "is empty"),
        ([3], "item 0 is int; wanted a pair"),
        ([(np.zeros((3, 3)) + 7, 0)], "the image of item 0: got floats from 7 to 7"),
        ([{"image": np.zeros((3, 3), np.uint8)}], "item 0 has no image or no label"),
    ):
        with pytest.raises(DataError, match=match):
            EpisodesFrom(items).prepare()


def test_a_run_on_a_folder(tmp_path: Path) -> None:
    (tmp_path / "root" / "nothing").mkdir(parents=True)
    config = {
        "problem": {"name": "few_shot", "ways": 2, "queries": 2, "test_queries": 2, "width": 4},
        "data": {"dataset": "image_folder", "root": str(folder(tmp_path / "root", 12)), "size": 16},
        "solver": {"name": "bome", "barrier": "per_task"},
        "steps": 2,
        "tasks_per_step": 2,
        "evaluation": {"episodes": 4},
        "log": {"tensorboard": False},
        "output_dir": str(tmp_path / "run"),
    }
    result = bomemeta.train(config)
    assert result.steps == 2
    assert "classes without images are left out: nothing" in result.notes


@pytest.mark.parametrize(("name", "classes"), [("caltech101", 72), ("tiny_imagenet", 160)])
def test_real_photographs(name: str, classes: int) -> None:
    data = os.environ.get("BOMEMETA_DATA")
    root = Path(data or "none") / name
    if not root.is_dir():
        pytest.skip(f"no folder {name} in BOMEMETA_DATA")
    few = sorted(path for path in root.iterdir() if path.is_dir())
    if name == "tiny_imagenet":
        assert [path.name for path in few] == ["test", "train", "validation"]
        few = [path for part in few for path in sorted(part.iterdir())]
    assert len(few) == classes
    kept = {"train": [few[0].name, few[1].name], "validation": [few[2].name], "test": [few[3].name]}
    if name == "caltech101":
        images = ImageFolder(root, size=32, split=kept)
        assert images.episode("train", EpisodeSpec(2, 5, 15), (0, 0, 0)).query.std() > 0.1
        assert images.notes[1:] == ()
