"""Files that are there whole or not at all, also after a full disk, `kill -9` or a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bomemeta.errors import BomemetaError


def unwritten(path: Path) -> Path:
    """Where the file lies while it is being written; a killed writer leaves it there."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well. OSErrors pass through and
    leave `path` as it was.

    One writer at a time: a killed writer's remains are overwritten by the next one, so none pile
    up.
    """
    temporary = unwritten(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name is on the disk only when the folder is; without this a power cut may bring the
    # old file back. Windows opens no folder.
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """A text file that is there whole or as it was. Raises BomemetaError."""
    with naming(path), written_whole(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a BomemetaError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise BomemetaError(
            f"{path} could not be written: {reason}. See to the disk, then `bomemeta resume` the run"
        ) from error
