"""Images decoded once per machine: a memory map that all processes share, keyed by content.

    FOLDER/images/KEY/images.npy    uint8 [n, C, H, W], class after class
    FOLDER/images/KEY/rows.json     which file each row is, and what could not be read
    FOLDER/images/index-*.json      hashes of files, so that an unchanged file is not read again

KEY is a hash of every file's bytes, of its class and of how it is decoded. A cache is written
beside its place and moved there whole, so several processes may start at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bomemeta.data.image_decoding import Pixels, Resize, Size, UnreadableImage, content_of, decode
from bomemeta.data.image_files import shown
from bomemeta.errors import DataError
from bomemeta.extras import installed
from bomemeta.paths import absolute

VERSION = 1  # of what is stored; another one makes other keys
CHUNK = 256  # files decoded between two writes
ABSENT = "absent"  # in place of a file's hash

Duplicates = Literal["drop", "keep", "error"]


class Stored(NamedTuple):
    """The decoded images. `counts[c]` rows belong to class c, and classes follow each other."""

    images: NDArray[np.uint8]  # [n, C, H, W], a read-only memory map
    counts: NDArray[np.int64]  # [classes]
    paths: list[Path]  # [n], the file of each row
    digest: str
    notes: list[str]


def cache_folder(folder: str | None = None) -> Path:
    """`folder`, or the environment's BOMEMETA_CACHE, or ~/.cache/bomemeta."""
    chosen = folder or os.environ.get("BOMEMETA_CACHE")
    if not chosen:
        return Path.home() / ".cache" / "bomemeta"
    return absolute(chosen, what="data.cache" if folder else "BOMEMETA_CACHE")


def open_images(
    files: dict[str, list[Path]],
    root: Path,
    folder: Path,
    *,
    size: Size,
    channels: int,
    resize: Resize,
    duplicates: Duplicates,
) -> Stored:
    """The images of these files, decoded now where no process has done so before. Raises DataError
    where none can be read, or `duplicates` is error and there are some.
    """
    folder = folder / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"image_folder: {folder} cannot be written ({error}). Set data.cache or BOMEMETA_CACHE to a "
            "folder for decoded images"
        ) from error
    hashes = _hashes([path for paths in files.values() for path in paths], root, folder)
    notes: list[str] = []
    kept = _without_duplicates(files, hashes, root, duplicates, notes)
    names, paths = list(kept), [path for of_class in kept.values() for path in of_class]
    content = [(name, [hashes[path] for path in kept[name]]) for name in names]
    how = [VERSION, list(size), channels, resize]
    digest = hashlib.sha256(json.dumps([how, content]).encode()).hexdigest()
    here = folder / digest[:32]
    if not (here / "rows.json").is_file():
        with locked(folder / f"{digest[:32]}.lock"):
            if not (here / "rows.json").is_file():
                _write(here, paths, size, channels, resize)
    images, unreadable = _stored(here, (len(paths), channels, *size))
    if unreadable:
        named = [f"{_short(paths[i], root)} ({why})" for i, why in unreadable]
        notes.append(f"{len(named)} files cannot be read and are left out: {shown(named)}")
    bad = {i for i, _ in unreadable}
    readable = [i for i in range(len(paths)) if i not in bad]
    if not readable:
        raise DataError(f"image_folder: no image in {root} can be read. {' '.join(notes)}")
    of_row = np.repeat(np.arange(len(names)), [len(kept[name]) for name in names])[readable]
    count = np.bincount(of_row, minlength=len(names)).astype(np.int64)
    return Stored(images, count, [paths[i] for i in readable], digest, notes)


def _stored(here: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], list[tuple[int, str]]]:
    """The images of a cache, and which of `shape[0]` files could not be read and why. Raises
    DataError.
    """
    try:
        record = json.loads((here / "rows.json").read_text(encoding="utf-8"))
        images = np.load(here / "images.npy", mmap_mode="r", allow_pickle=False)
        unreadable = [(int(i), str(why)) for i, why in record["unreadable"]]
        wanted = (shape[0] - len(unreadable), *shape[1:])
        if images.shape != wanted or images.dtype != np.uint8:
            raise ValueError(f"images.npy is {images.dtype} {list(images.shape)}, not {wanted}")
    except (OSError, ValueError, TypeError, KeyError, EOFError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"image_folder: the cache {here} is damaged ({reason}). Delete it: it is made again"
        ) from error
    return images, unreadable


def write_folder(here: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder `here` whole or not at all: `write` fills a folder beside it, which then
    takes its place. What another process has put there in the meantime stays.
    """
    here.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=here.parent, prefix=f"{here.name}.part-"))
    try:
        write(part)
        os.chmod(part, 0o755)  # mkdtemp's folders are for their owner alone
        # Fails where another process was first, whose folder is as good.
        with contextlib.suppress(OSError):
            os.rename(part, here)
        if not here.is_dir():
            raise DataError(f"{here} cannot be written; is the disk full?")
    except OSError as error:
        raise DataError(
            f"{here} cannot be written ({error}). Set BOMEMETA_CACHE to a folder with more room"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time, so that the others wait and do not work twice.

    Only that: results are right without it, where a system has no such lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if installed("fcntl"):
            import fcntl

            # Some network file systems have no locks.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(here: Path, paths: list[Path], size: Size, channels: int, resize: Resize) -> None:
    def fill(part: Path) -> None:
        images = np.lib.format.open_memmap(
            part / "all.npy", mode="w+", dtype=np.uint8, shape=(len(paths), channels, *size)
        )
        unreadable: list[tuple[int, str]] = []
        there = 0
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            for start in range(0, len(paths), CHUNK):
                chunk = paths[start : start + CHUNK]
                decoded = threads.map(lambda path: _decoded(path, size, channels, resize), chunk)
                for i, found in enumerate(decoded, start):
                    if isinstance(found, str):
                        unreadable.append((i, found))
                    else:
                        images[there] = found
                        there += 1
        images.flush()
        if there == len(paths):
            os.rename(part / "all.npy", part / "images.npy")
        else:
            np.save(part / "images.npy", images[:there])
            (part / "all.npy").unlink()
        (part / "rows.json").write_text(json.dumps({"unreadable": unreadable}), encoding="utf-8")

    write_folder(here, fill)


def _decoded(path: Path, size: Size, channels: int, resize: Resize) -> Pixels | str:
    """The image, or why there is none."""
    try:
        return decode(content_of(path), size, channels, resize)
    except UnreadableImage as error:
        return str(error)


def _hashes(paths: list[Path], root: Path, folder: Path) -> dict[Path, str]:
    """SHA-256 of every file; those whose size and time are in the index are not read."""
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    index_file = folder / f"index-{name}.json"
    known: Any = {}
    # An index that cannot be read is made again.
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(index_file.read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) else {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        found = list(threads.map(lambda path: _entry(path, known.get(str(path))), paths))
    index = {str(path): entry for path, entry in zip(paths, found, strict=True)}
    if index != known:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as part:
            json.dump(index, part)
        os.replace(part.name, index_file)
    return {path: str(entry[2]) for path, entry in zip(paths, found, strict=True)}


def _entry(path: Path, known: Any) -> list[Any]:
    """Size, time of change in ns, and hash."""
    try:
        state = path.stat()
        if (
            isinstance(known, list)
            and len(known) == 3
            and known[:2] == [state.st_size, state.st_mtime_ns]
        ):
            return known
        return [state.st_size, state.st_mtime_ns, hashlib.sha256(content_of(path)).hexdigest()]
    # A link that leads nowhere, a pipe, no right to read: named when it is decoded.
    except (OSError, UnreadableImage):
        return [0, 0, ABSENT]


def _without_duplicates(
    files: dict[str, list[Path]],
    hashes: dict[Path, str],
    root: Path,
    duplicates: Duplicates,
    notes: list[str],
) -> dict[str, list[Path]]:
    """The files without copies: of one within a class the first stays, of one in two classes none,
    because its class is not known.
    """
    if duplicates == "keep":
        return files
    classes: dict[str, set[str]] = {}
    for name, paths in files.items():
        for path in paths:
            classes.setdefault(hashes[path], set()).add(name)
    kept: dict[str, list[Path]] = {}
    within, between = [], []
    for name, paths in files.items():
        seen: set[str] = set()
        kept[name] = []
        for path in paths:
            content = hashes[path]
            if content != ABSENT and len(classes[content]) > 1:
                between.append(_short(path, root))
            elif content != ABSENT and content in seen:
                within.append(_short(path, root))
            else:
                kept[name].append(path)
            seen.add(content)
    if duplicates == "error" and (within or between):
        raise DataError(
            f"image_folder: {len(within) + len(between)} files are copies of others: "
            f"{shown(within + between)}. Remove them, or set data.duplicates to drop or keep"
        )
    if between:
        notes.append(
            f"{len(between)} files are the same image in two classes and are left out: {shown(between)}"
        )
    if within:
        notes.append(
            f"{len(within)} files are copies of others of their class and are left out: {shown(within)}"
        )
    return kept


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
