"""Locations at a URI (s3://, gs://, abfs://, file:// ...), and run folders there: worked on in a local
folder, which is copied while the run continues. What is there is always a run that can be resumed:
a new checkpoint is complete before the older one is removed.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bomemeta.errors import ConfigError, StorageError
from bomemeta.paths import check_no_keys

# Pauses before another try. Object stores answer "slow down" for seconds; what lasts longer is left
# to the next checkpoint.
PAUSES_S = (1.0, 2.0, 4.0)
# Stores that need no folders, and in which a file appears whole when its writer closes it.
OBJECT_STORES = {"s3", "gcs", "abfs"}
# Each read is a request to an object store, of some ten milliseconds.
READ_BYTES = 16 * 2**20

T = TypeVar("T")


class Stamp(NamedTuple):
    """A local file as it was when it was last sent."""

    size: int
    modified_ns: int


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI and not a path."""
    return (
        isinstance(location, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None
    )


def below(location: str | Path, name: str) -> Path | str:
    """The location `name` within a location: a path, or a URI, of which what it says after a
    question mark stays at its end.
    """
    if not is_uri(location):
        return Path(location) / name
    whole, mark, rest = str(location).partition("?")
    return f"{whole.rstrip('/')}/{name}{mark}{rest}"


class Store:
    """The files of a folder on a disk or at a URI, by their names below it. What fails is tried
    again.

    `location` is how errors call it. All methods raise StorageError.
    """

    def __init__(self, files: Any, root: str, location: str) -> None:
        self._files, self._root, self.location = files, root.rstrip("/"), location

    @classmethod
    def at(cls, location: str | Path) -> Store:
        """Raises ConfigError where the URI's scheme is not known."""
        from pyarrow.fs import LocalFileSystem

        files, root = (
            _filesystem(str(location))
            if is_uri(location)
            else (LocalFileSystem(), str(Path(location).absolute()))
        )
        return cls(files, root, str(location))

    def names(self) -> list[str]:
        """All files that are there whole, in the order of their names; [] where there is no folder."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._root, recursive=True, allow_not_found=True)
        found = self._again(lambda: self._files.get_file_info(selector), "cannot be listed")
        start = len(self._root) + 1
        names = [info.path[start:] for info in found if info.type == FileType.File]
        return sorted(name for name in names if not _unfinished(name))

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""

        def content() -> bytes | None:
            try:
                with self._files.open_input_file(
                    f"{self._root}/{name}"
                ) as file:  # a stream is read in small pieces
                    found: bytes = file.read()
            except FileNotFoundError:
                return None
            return found

        return self._again(content, f"cannot be read ({name})")

    def get(self, name: str, path: Path) -> None:
        """Copies a file from here to a path."""

        def copy() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                self._files.open_input_stream(f"{self._root}/{name}") as file,
                path.open("wb") as target,
            ):
                shutil.copyfileobj(file, target, READ_BYTES)

        self._again(copy, f"cannot be read ({name})")

    def put(self, name: str, content: Path | bytes) -> None:
        """Makes or replaces a file, from another one or from bytes: at any time the old one or the
        new one is there whole.
        """
        self._again(lambda: self._put(name, content), f"cannot be written to ({name})")

    def remove(self, name: str) -> None:
        """Removes a file; it may be gone already."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._files.delete_file(f"{self._root}/{name}")

        self._again(delete, f"cannot be removed from ({name})")

    def clear(self) -> None:
        """Removes the folder with everything in it, if it is there."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._files.delete_dir(self._root)

        self._again(delete, "cannot be removed")

    def _put(self, name: str, content: Path | bytes) -> None:
        target = f"{self._root}/{name}"
        if self._files.type_name in OBJECT_STORES:
            self._copy(content, target)
            return
        folder, _, last = target.rpartition("/")
        self._files.create_dir(folder, recursive=True)
        self._copy(content, f"{folder}/.{last}.tmp")
        self._files.move(f"{folder}/.{last}.tmp", target)

    def _copy(self, content: Path | bytes, target: str) -> None:
        source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
        with source, self._files.open_output_stream(target) as file:
            shutil.copyfileobj(source, file)

    def _again(self, action: Callable[[], T], what: str) -> T:
        for pause_s in (*PAUSES_S, None):
            try:
                return action()
            except _errors() as error:
                if pause_s is None:
                    reason = str(error).partition("\n")[0]
                    raise StorageError(
                        f"{self.location} {what}, in {len(PAUSES_S) + 1} tries: {reason}"
                    ) from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")


class Mirror:
    """A folder at a URI and its local copy, `folder`, in the temporary directory (TMPDIR chooses
    it). The copy goes with this object, unless something in it could not be sent.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._store = Store.at(self.uri)
        self._sent: dict[
            str, Stamp
        ] = {}  # what is there as far as we know, by its path below the folder
        self._lock = threading.Lock()
        self.folder = Path(tempfile.mkdtemp(prefix="bomemeta-")).resolve()
        self._cleanup = self._make_cleanup()

    def names(self) -> list[str]:
        """What is at the URI, as paths below it. Raises StorageError."""
        return self._store.names()

    def fetch(self) -> None:
        """Copies what is there into the local folder: all that a resumed run needs. Raises StorageError."""
        for name in self.names():
            # Seeds are runs of their own, and event files of a resumed run begin anew.
            if not name.startswith(("seed-", "tensorboard/")):
                self._store.get(name, self.folder / name)
                self._sent[name] = _stamp(self.folder / name)

    def send(self) -> None:
        """Copies what is new or has changed, then removes what is gone here. Raises StorageError;
        the next call does what is left.
        """
        with self._lock:  # a SIGTERM sends from a thread of its own
            self._cleanup.detach()
            local = {
                path.relative_to(self.folder).as_posix(): path
                for path in self.folder.rglob("*")
                if path.is_file()
            }
            local = {name: path for name, path in local.items() if not _unfinished(name)}
            for name in sorted(
                set(local) - {"result.json"},
                key=lambda name: (name.startswith("checkpoints/"), name),
            ):
                self._send(name, local[name])
            for name in sorted(set(self._sent) - set(local)):
                self._store.remove(name)
                del self._sent[name]
            if "result.json" in local:  # last: where it is, everything is
                self._send("result.json", local["result.json"])
            self._cleanup = self._make_cleanup()

    def _make_cleanup(self) -> weakref.finalize[[Path, bool], Mirror]:
        return weakref.finalize(self, shutil.rmtree, self.folder, True)

    def _send(self, name: str, path: Path) -> None:
        stamp = _stamp(path)
        if self._sent.get(name) != stamp:
            self._store.put(name, path)
            self._sent[name] = stamp


def _filesystem(uri: str) -> tuple[Any, str]:
    check_no_keys(uri, "location")
    try:
        from pyarrow.fs import FileSystem
    except ImportError as error:
        raise ConfigError(
            f"output_dir: {uri} needs pyarrow, which cannot be imported: {error}"
        ) from error
    try:
        return FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except _errors() as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"output_dir: {uri} is no location that pyarrow can write to: {reason}. Use s3://, gs:// or file:///"
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    from pyarrow import ArrowException

    return OSError, ArrowException


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns)


def _unfinished(name: str) -> bool:
    """Files on their way to their own name, here (`files.written_whole`) and there."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".tmp")
