"""Which image files there are, and the class and split of each: read off folders or a CSV."""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bomemeta.data.episodes import Split
from bomemeta.errors import ConfigError, DataError
from bomemeta.paths import absolute

SUFFIXES = (
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".avif", ".tga"}
    | {".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
DEFAULT_SHARES = (0.6, 0.2, 0.2)  # of the classes
SHOWN = 5  # names in a note or an error


@dataclass
class Listing:
    """The files of every class, and the classes of every split. Paths sort alike everywhere."""

    files: dict[str, list[Path]]  # class to its files
    splits: dict[Split, list[str]]  # classes; disjoint
    notes: list[str] = field(default_factory=list)


def list_images(
    root: Path, split: Sequence[float] | dict[Split, list[str]] | None, split_seed: int
) -> Listing:
    """The images under `root`: CLASS/*, {train,validation,test}/CLASS/*, or a CSV file with the
    columns path, label and perhaps split. Raises DataError.

    `split`: shares of the classes, drawn with `split_seed`, or the classes of each split by name;
    None: what the folders or the CSV say, else shares of 0.6, 0.2 and 0.2.
    """
    notes: list[str] = []
    if root.is_file():
        files, given = _from_csv(root)
    elif root.is_dir():
        files, given = _from_folders(root, notes)
    else:
        raise DataError(
            f"image_folder: {root} does not exist. data.root is a folder of class folders, or a CSV file"
        )
    empty = sorted(name for name, paths in files.items() if not paths)
    if empty:
        notes.append(f"classes without images are left out: {shown(empty)}")
    files = {name: files[name] for name in sorted(files) if files[name]}
    if not files:
        raise DataError(
            f"image_folder: {root} has no images in class folders. Wanted {root}/CLASS/*.jpg, "
            f"{root}/train/CLASS/*.jpg, or a CSV file with the columns path and label"
        )
    if isinstance(split, dict):
        splits = _by_name(split, list(files), notes)
    elif given is not None and split is None:
        splits = _given(given, list(files), split_seed, notes)
    else:
        splits = drawn_splits(list(files), split or DEFAULT_SHARES, split_seed)
    kept = {name for names in splits.values() for name in names}
    return Listing({name: paths for name, paths in files.items() if name in kept}, splits, notes)


def shown(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def drawn_splits(
    names: list[str], shares: Sequence[float], split_seed: int
) -> dict[Split, list[str]]:
    """The classes cut into three parts after a permutation that follows from `split_seed`."""
    order = np.random.default_rng([split_seed, len(names)]).permutation(len(names))
    edges = np.round(np.cumsum(shares) / sum(shares) * len(names)).astype(int)
    parts = np.split(order, edges[:2])
    return {
        split: sorted(names[i] for i in part) for split, part in zip(SPLITS, parts, strict=True)
    }


def _from_folders(
    root: Path, notes: list[str]
) -> tuple[dict[str, list[Path]], dict[Split, list[str]] | None]:
    folders, loose = _entries(root)
    known = [path for path in folders if path.name.lower() in SPLIT_FOLDERS]
    # A class may be called "train" too: it then holds images, and no folders.
    if "train" in {SPLIT_FOLDERS[path.name.lower()] for path in known if _entries(path)[0]}:
        return _from_split_folders(root, folders, known, notes)
    if loose:
        notes.append(
            f"{len(loose)} images lie in {root} itself and belong to no class; they are left out: "
            f"{shown([path.name for path in loose])}"
        )
    return {path.name: _images_below(path, notes) for path in folders}, None


def _from_split_folders(
    root: Path, folders: list[Path], known: list[Path], notes: list[str]
) -> tuple[dict[str, list[Path]], dict[Split, list[str]]]:
    others = [path.name for path in folders if path not in known]
    if others:
        raise DataError(
            f"image_folder: {root} has a train folder with class folders, and beside it {shown(others)}. "
            "Wanted class folders alone, or the folders train, validation and test alone"
        )
    files: dict[str, list[Path]] = {}
    splits: dict[Split, list[str]] = {}
    for folder in known:
        split = SPLIT_FOLDERS[folder.name.lower()]
        if split in splits:
            raise DataError(f"image_folder: {root} has two folders for the {split} split")
        classes, loose = _entries(folder)
        if loose:
            notes.append(
                f"{len(loose)} images lie in {folder} itself and belong to no class; they are left out"
            )
        splits[split] = [path.name for path in classes]
        twice = sorted(set(splits[split]) & set(files))
        if twice:
            raise DataError(
                f"image_folder: {shown(twice)} are classes of the {split} split and of another one in "
                f"{root}. Few-shot learning is tested on classes that it has not seen: merge the "
                "folders into one folder of classes, and data.split draws disjoint classes"
            )
        files |= {path.name: _images_below(path, notes) for path in classes}
    return files, splits


def _given(
    given: dict[Split, list[str]], there: list[str], split_seed: int, notes: list[str]
) -> dict[Split, list[str]]:
    """The splits that the data have; a missing validation split is drawn from the training one."""
    splits = {split: [name for name in there if name in given.get(split, ())] for split in SPLITS}
    if not splits["validation"] and splits["train"]:
        train, validation, _ = drawn_splits(splits["train"], (0.8, 0.2, 0), split_seed).values()
        splits |= {"train": train, "validation": validation}
        notes.append(
            f"there is no validation split: {len(validation)} training classes are drawn for it "
            "(a fifth)"
        )
    return splits


def _by_name(
    split: dict[Split, list[str]], there: list[str], notes: list[str]
) -> dict[Split, list[str]]:
    seen: dict[str, Split] = {}
    for part, names in split.items():
        for name in names:
            if name not in there:
                near = difflib.get_close_matches(name, there, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"There are: {shown(there)}"
                raise DataError(
                    f"image_folder: data.split.{part}: there is no class {name!r} with images. {hint}"
                )
            if name in seen:
                raise DataError(
                    f"image_folder: data.split: class {name!r} is in {seen[name]} and in {part}; a class "
                    "belongs to one split, once"
                )
            seen[name] = part
    left = [name for name in there if name not in seen]
    if left:
        notes.append(f"{len(left)} classes are in no list of data.split: {shown(left)}")
    return {part: sorted(split.get(part, [])) for part in SPLITS}


def _from_csv(path: Path) -> tuple[dict[str, list[Path]], dict[Split, list[str]] | None]:
    files: dict[str, list[Path]] = {}
    split_of: dict[str, Split] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise DataError(
                    f"image_folder: {path}: wanted a first line that names the columns path and label "
                    f"(and perhaps split); got {', '.join(columns) or 'an empty file'}"
                )
            for row in reader:
                label, image = (row["label"] or "").strip(), (row["path"] or "").strip()
                if not label or not image:
                    raise DataError(f"image_folder: {path}:{reader.line_num}: no path or no label")
                # A `$` in a picture's name is a letter like others.
                where, plain = f"image_folder: {path}:{reader.line_num}", image.replace("$", "S")
                named = (
                    absolute(plain, path.parent, where) if plain == image else path.parent / image
                )
                files.setdefault(label, []).append(named)
                if "split" in columns:
                    part = SPLIT_FOLDERS.get((row["split"] or "").strip().lower())
                    if part is None:
                        raise DataError(
                            f"image_folder: {path}:{reader.line_num}: split {row['split']!r}; wanted "
                            "train, validation or test"
                        )
                    if split_of.setdefault(label, part) != part:
                        raise DataError(
                            f"image_folder: {path}:{reader.line_num}: class {label!r} is in {part} here and "
                            f"in {split_of[label]} above; a class belongs to one split"
                        )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"image_folder: {path} is not a readable CSV file in UTF-8: {error}"
        ) from error
    except ConfigError as error:
        raise DataError(str(error)) from error
    files = {label: sorted(set(paths)) for label, paths in files.items()}
    if not split_of:
        return files, None
    return files, {
        split: [name for name, of in split_of.items() if of == split] for split in SPLITS
    }


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the images in a folder, sorted; hidden ones are not looked at."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                if _is_folder(entry):
                    folders.append(folder / entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    images.append(folder / entry.name)
    except OSError as error:
        raise DataError(f"image_folder: {folder} cannot be read: {error}") from error
    return sorted(folders), sorted(images)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: named when it is decoded
        return False


def _images_below(folder: Path, notes: list[str]) -> list[Path]:
    """All images in a class's folder and below it. Links are followed, circles of links once."""
    found = sorted(_walk(folder, frozenset()))
    deep = sum(path.parent != folder for path in found)
    if deep:
        notes.append(
            f"class {folder.name} has {deep} images in folders of its own; they are its too"
        )
    return found


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    folders, images = _entries(folder)
    yield from images
    for below in folders:
        yield from _walk(below, above | {real})
