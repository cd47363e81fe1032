"""Run folders at a URI (s3://, gs://, abfs://, file:// ...): worked on in a local folder, which is copied there as the run goes on.

What is there is always a run that can be gone on with: a new checkpoint is complete before the older one is removed.
"""

from __future__ import annotations

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

# Pauses before another try. Object stores answer "slow down" for seconds; what lasts longer is left to the next checkpoint.
PAUSES_S = (1.0, 2.0, 4.0)
# Stores that need no folders, and in which a file appears whole when its writer closes it.
OBJECT_STORES = {"s3", "gcs", "abfs"}

T = TypeVar("T")


class Stamp(NamedTuple):
    """A local file as it was when it was last sent."""

    size: int
    modified_ns: int


def is_uri(place: str | Path) -> bool:
    """Whether a place is a URI and not a path."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


class Mirror:
    """A folder at a URI and its local copy, `folder`, in the temporary directory (TMPDIR chooses it). The copy goes with this object,
    unless something in it could not be sent.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._files, self._root = _filesystem(self.uri)
        self._sent: dict[str, Stamp] = {}  # what is there as far as we know, by its path below the folder
        self._lock = threading.Lock()
        self.folder = Path(tempfile.mkdtemp(prefix="bomemeta-")).resolve()
        self._cleanup = self._make_cleanup()

    def names(self) -> list[str]:
        """What is at the URI, as paths below it. Raises StorageError."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._root, recursive=True, allow_not_found=True)
        found = self._again(lambda: self._files.get_file_info(selector), "cannot be listed")
        start = len(self._root.rstrip("/")) + 1
        names = [info.path[start:] for info in found if info.type == FileType.File]
        return sorted(name for name in names if not _unfinished(name))

    def fetch(self) -> None:
        """Copies what is there into the local folder: all that going on needs. Raises StorageError."""
        for name in self.names():
            # Seeds are runs of their own, and event files of a run that goes on begin anew.
            if not name.startswith(("seed-", "tensorboard/")):
                self._again(lambda name=name: self._get(name), f"cannot be read ({name})")  # type: ignore[misc]
                self._sent[name] = _stamp(self.folder / name)

    def send(self) -> None:
        """Copies what is new or has changed, then removes what is gone here. Raises StorageError; the next call does what is left."""
        with self._lock:  # a SIGTERM sends from a thread of its own
            self._cleanup.detach()
            local = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
            local = {name: path for name, path in local.items() if not _unfinished(name)}
            for name in sorted(set(local) - {"result.json"}, key=lambda name: (name.startswith("checkpoints/"), name)):
                self._send(name, local[name])
            for name in sorted(set(self._sent) - set(local)):
                self._again(lambda name=name: self._remove(name), f"cannot be removed from ({name})")  # type: ignore[misc]
                del self._sent[name]
            if "result.json" in local:  # last: where it is, everything is
                self._send("result.json", local["result.json"])
            self._cleanup = self._make_cleanup()

    def _make_cleanup(self) -> weakref.finalize[[Path, bool], Mirror]:
        return weakref.finalize(self, shutil.rmtree, self.folder, True)

    def _send(self, name: str, path: Path) -> None:
        stamp = _stamp(path)
        if self._sent.get(name) != stamp:
            self._again(lambda: self._put(name, path), f"cannot be written to ({name})")
            self._sent[name] = stamp

    def _put(self, name: str, path: Path) -> None:
        target = f"{self._root}/{name}"
        if self._files.type_name in OBJECT_STORES:
            self._copy(path, target)
            return
        self._files.create_dir(target.rpartition("/")[0], recursive=True)
        folder, _, last = target.rpartition("/")
        self._copy(path, f"{folder}/.{last}.tmp")
        self._files.move(f"{folder}/.{last}.tmp", target)

    def _copy(self, path: Path, target: str) -> None:
        with path.open("rb") as source, self._files.open_output_stream(target) as file:
            shutil.copyfileobj(source, file)

    def _get(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._files.open_input_stream(f"{self._root}/{name}") as file, path.open("wb") as target:
            shutil.copyfileobj(file, target)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.delete_file(f"{self._root}/{name}")

    def _again(self, action: Callable[[], T], what: str) -> T:
        for pause_s in (*PAUSES_S, None):
            try:
                return action()
            except _errors() as error:
                if pause_s is None:
                    reason = str(error).partition("\n")[0]
                    raise StorageError(f"{self.uri} {what}, in {len(PAUSES_S) + 1} tries: {reason}") from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        from pyarrow.fs import FileSystem
    except ImportError as error:
        raise ConfigError(f"output_dir: {uri} needs pyarrow, which cannot be imported: {error}") from error
    try:
        return FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except _errors() as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"output_dir: {uri} is no place that pyarrow can write to: {reason}. Use s3://, gs:// or file:///"
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
