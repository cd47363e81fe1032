"""Where archives of arrays (`.npz`) lie, how they are read and written. Pickles are refused:
nothing in a data file is executed.

The workers of a node share what they read: the first writes the arrays, as they are in memory, to
the cache, and all map them.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bomemeta.boundary import refusing
from bomemeta.errors import DataError
from bomemeta.limits import available_memory, size_text
from bomemeta.paths import SHARED_DATA, absolute

MAPPED_BYTES = 2**20  # smaller arrays are read into memory all the same


def data_folder(dataset: str, root: str | None, prepared: str | None = None) -> Path:
    """`root`, or else the environment's BOMEMETA_DATA. Raises DataError where neither is given,
    which says that `bomemeta data prepare` fills one, under the data set's own name or the name
    `prepared`.
    """
    chosen = root or os.environ.get("BOMEMETA_DATA")
    if not chosen:
        raise DataError(
            f"{dataset}: no data folder is given. Set data.root in the config or BOMEMETA_DATA in the environment; "
            f"`bomemeta data prepare {prepared or dataset} --root FOLDER` fills one"
        )
    return absolute(chosen, what="data.root" if root else "BOMEMETA_DATA")


def find(dataset: str, file: str, root: str | None) -> Path:
    """The path of `file` in the data folder. Raises DataError that says where it looked and how to
    get it.
    """
    path = data_folder(dataset, root) / file
    if not path.is_file():
        where = "data.root" if root else "BOMEMETA_DATA"
        raise DataError(
            f"{dataset}: {path} does not exist (the folder is from {where}). Get it with `bomemeta data prepare {dataset} "
            f"--root {path.parent}`, or point data.root or BOMEMETA_DATA at a folder that has it"
        )
    return path


def read(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of an archive, in this machine's byte order; in workers, memory that is
    shared until it is written.

    Raises DataError where the file is damaged, encrypted, holds pickles, lacks one of them, or says
    that one is larger than what is there or than what this machine has free. What an array declares
    is compared with the bytes that are there before anything is read.
    """

    if os.environ.get(SHARED_DATA) != "1" or not path.exists():
        return _read(path, names)
    from bomemeta.data.image_cache import cache_folder, locked, write_folder

    state = path.stat()
    key = repr((str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino, list(names)))
    here = cache_folder() / "arrays" / hashlib.sha256(key.encode()).hexdigest()[:32]
    arrays: dict[str, NDArray[Any]] = {}

    def fill(part: Path) -> None:
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)

    try:
        if not here.is_dir():
            with locked(here.with_suffix(".lock")):  # one reads, the others wait
                if not here.is_dir():
                    arrays = _read(path, names)
                    if sum(array.nbytes for array in arrays.values()) < MAPPED_BYTES:
                        return arrays
                    write_folder(here, fill)
        return {name: _mapped(here / f"{name}.npy") for name in names}
    except (OSError, ValueError, DataError):  # a cache that cannot be written, or is damaged
        return arrays or _read(path, names)


def _mapped(path: Path) -> NDArray[Any]:
    size = path.stat().st_size
    mode: Any = "c" if size >= MAPPED_BYTES else None
    return np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))


def _read(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    def unreadable(why: str) -> DataError:
        wanted = f"{path} is not a readable archive of the arrays {', '.join(names)}"
        return DataError(f"{wanted}: {why}. Delete it and get it again")

    if not path.exists():
        raise DataError(
            f"{path} does not exist; wanted an archive of the arrays {', '.join(names)}"
        )
    try:
        with refusing(unreadable, named=False), zipfile.ZipFile(path) as archive:
            return {name: _member(archive, name) for name in names}
    except _Member as error:
        raise unreadable(str(error)) from error.__cause__


class _Member(DataError):
    """What is wrong with an array of an archive."""


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array. Raises _Member, and whatever zipfile and numpy raise."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    entry = entries.get(f"{name}.npy") or entries.get(name)
    if entry is None:
        there = ", ".join(sorted(entries)[:8]) or "nothing"
        raise _Member(f"it has no array {name}; there is {there}")
    if entry.flag_bits & 1:
        raise _Member(f"{name} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _Member(
            f"{name} is compressed by method {entry.compress_type}; numpy's savez and savez_compressed write 0 and 8"
        )
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise _Member(f"{name} is of version {version[0]}.{version[1]} of numpy's format")
        with (
            refusing(lambda why: _Member(f"numpy's header of {name} cannot be read ({why})")),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            else:  # version 3 differs in the names of fields, which no array here has
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        if dtype.hasobject:
            raise _Member(f"{name} holds Python objects, which only a pickle can: it is not read")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise _Member(f"{name} has the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        there_are = entry.file_size - file.tell()
        if size != there_are:
            raise _Member(
                f"{name} says that it is {dtype} {list(shape)}, {size_text(size)}, and {there_are} bytes follow"
            )
        memory = available_memory()
        if memory is not None and size > memory:
            raise _Member(
                f"{name} is {dtype} {list(shape)}, {size_text(size)}; this machine has {size_text(memory)} free"
            )
        content = bytearray(
            file.read(size + 1)
        )  # to the end: only there zipfile compares the checksum
    if len(content) != size:
        raise _Member(f"{name} ends early")
    array = np.frombuffer(content, dtype, math.prod(shape)) if size else np.zeros(0, dtype)
    array = array.reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)


def write(path: Path, arrays: dict[str, NDArray[Any]], *, compress: bool) -> None:
    """Writes the archive whole or not at all, so that a reader or a second writer never meets half
    a file. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save: Any = np.savez_compressed if compress else np.savez
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as part:
        try:
            save(part, **arrays)
            part.close()
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
