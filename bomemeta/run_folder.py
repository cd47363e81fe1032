"""The folder that a run leaves behind: on a disk, or at a URI with a local copy to work on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bomemeta.checkpoint import load_latest
from bomemeta.config import Config
from bomemeta.document import read_document
from bomemeta.errors import CheckpointError, ConfigError, StorageError
from bomemeta.extras import installed
from bomemeta.files import naming, replace_text, unwritten, written_whole
from bomemeta.paths import absolute, made_absolute, real
from bomemeta.records import changes, is_changed, read_sealed, sealed, with_digest
from bomemeta.storage import Mirror, is_uri
from bomemeta.trust import entries_of, record
from bomemeta.yaml_text import dump

# How long to wait for another process in the same run folder: longer than `ray job stop` takes to
# end one.
LOCK_PATIENCE_S = 20.0


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `path` is absolute. Where output_dir is a URI, `mirror` is what copies
    `path`, a temporary folder, there.
    """

    path: Path
    mirror: Mirror | None = None
    kept: bool = True  # False: it is removed when the run ends

    @property
    def location(self) -> Path | str:
        """Where the run is to be found afterwards: the path or the URI."""
        return self.path if self.mirror is None else self.mirror.uri

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @classmethod
    def create(cls, output_dir: str | None, config_name: str, config: Config) -> RunFolder:
        """A new folder with the config in it: `output_dir`, or the first free of runs/NAME,
        runs/NAME-2, ...

        Raises ConfigError where `output_dir` holds something already or cannot be made.
        """
        try:
            if output_dir is None:
                folder = cls(_first_free(Path("runs") / config_name).resolve())
            elif is_uri(output_dir):
                folder = cls._at(output_dir)
                if folder.mirror is not None and folder.mirror.names():
                    raise ConfigError(_taken(output_dir, output_dir))
            else:
                path = absolute(output_dir, what="output_dir")
                if not _claim(path):
                    raise ConfigError(_taken(real(path), output_dir))
                folder = cls(real(path))
            folder.write_config(config)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {error.filename} cannot be written: {error.strerror}"
            ) from error
        if folder.mirror is not None:
            try:
                folder.mirror.send()  # what it would refuse it refuses now
            except StorageError:
                folder.config_file.unlink()
                folder.path.rmdir()
                raise
        return folder

    @classmethod
    @contextlib.contextmanager
    def passing(cls, config: Config) -> Iterator[RunFolder]:
        """A temporary folder with the config in it, for as long as the block lasts."""
        with tempfile.TemporaryDirectory(prefix="bomemeta-", ignore_cleanup_errors=True) as path:
            folder = cls(Path(path).resolve(), kept=False)
            folder.write_config(config)
            yield folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. Raises ConfigError where it is not one."""
        if (folder := cls.find(path)) is not None:
            folder.check_config()
            return folder
        location = path if is_uri(path) else real(absolute(path, what="run folder"))
        runs = sorted(str(file.parent) for file in Path("runs").glob("*/config.yaml"))
        hint = (
            f"Runs here: {', '.join(runs)}"
            if runs
            else "`bomemeta train` prints the folder of each run"
        )
        raise ConfigError(f"{location} is not a run's folder: it has no config.yaml. {hint}")

    @classmethod
    def find(cls, path: str | Path) -> RunFolder | None:
        """The folder of an earlier run, or None where none has written its config."""
        folder = (
            cls.fetched(str(path)) if is_uri(path) else cls(real(absolute(path, what="run folder")))
        )
        if folder.config_file.is_file():
            return folder
        if folder.mirror is None and folder.path.is_dir():
            unwritten(folder.config_file).unlink(
                missing_ok=True
            )  # of a process that was killed as it began
        return None

    @classmethod
    def fetched(cls, uri: str) -> RunFolder:
        """The folder at a URI with all that is there, be it nothing."""
        folder = cls._at(uri)
        assert folder.mirror is not None
        folder.mirror.fetch()
        return folder

    @classmethod
    def _at(cls, uri: str) -> RunFolder:
        mirror = Mirror(uri)
        return cls(mirror.folder, mirror)

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keeps other processes on this machine out, and has everything at the URI, if there is
        one, at the end.

        Raises ConfigError where another process is at work in the folder, StorageError where the
        URI cannot be written at the end.
        """
        with _locked(self.path):
            try:
                yield
            except BaseException:
                self.publish(say)
                raise
            if self.mirror is not None:
                try:
                    self.mirror.send()
                except StorageError as error:
                    raise StorageError(
                        f"{error}. Nothing is lost: the run as it is now is in {self.path}"
                    ) from error

    def publish(self, say: Callable[[str], None]) -> None:
        """Copies what is new to the URI, where there is one. What fails is said, and done the next
        time.
        """
        if self.mirror is not None:
            try:
                self.mirror.send()
            except StorageError as error:
                say(f"{error}. {self._what_is_here()}")

    def _what_is_here(self) -> str:
        # A run that never began takes its temporary folder along: that is not to be named.
        if not self.checkpoints.is_dir():
            return f"Nothing was computed that could be lost; {self.location} is as it was"
        return f"Nothing is lost: the run is in {self.path}, and what is missing is sent with the next checkpoint"

    def abandon(self) -> None:
        """Takes back a folder in which nothing happened; one that holds more than the config stays."""
        if not self.path.is_dir():
            return
        if [path.name for path in self.path.iterdir()] == [self.config_file.name]:
            self.config_file.unlink()
            if self.mirror is not None:
                self.mirror.send()
            self.path.rmdir()

    def write_config(self, config: Config) -> None:
        """Every key with its value, so that the run does not depend on a later version's defaults."""
        values = config.to_dict()
        made_absolute(values, Path.cwd())  # those of objects that Python code gave
        if self.kept:
            record(entries_of(values))
        replace_text(self.config_file, with_digest(dump(values)))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replaces result.json; NaN and infinite numbers, which JSON does not have, become null."""
        # As JSON reads it back, which is what the digest is of.
        record = json.loads(json.dumps(finite(result)))
        replace_text(self.result_file, json.dumps(sealed(record), indent=2) + "\n")

    def recorded_config(self) -> tuple[dict[str, Any], str | None]:
        """The config of the folder's run as plain values, with what had to be passed over: where
        config.yaml is damaged, that of the newest checkpoint.

        Raises ConfigError where both are.
        """
        try:
            there = read_document(self.config_file).data
            if not is_changed(self.config_file) and isinstance(there.get("imports"), list):
                return there, None
            reason = "is not as the run wrote it"
        except (OSError, ConfigError) as error:
            reason = f"cannot be read ({str(error).partition(chr(10))[0]})"
        try:
            there = load_latest(self.checkpoints).checkpoint.config
        except CheckpointError as error:
            raise ConfigError(f"{self.config_file} {reason}, and {error}") from error
        return (
            there,
            f"{self.config_file} {reason}; the newest checkpoint's config is used, and written anew",
        )

    def check_config(self) -> None:
        """Raises ConfigError naming the keys where config.yaml was changed after a run wrote it."""
        anew = f"`bomemeta train CONFIG output_dir={self.location} --auto-resume` writes it anew"
        try:
            there: Any = read_document(self.config_file).data
        except (OSError, ConfigError) as error:
            raise ConfigError(f"{str(error).partition(chr(10))[0]}. {anew}") from error
        if not is_changed(self.config_file):
            return
        try:
            written = load_latest(self.checkpoints).checkpoint.config
        except CheckpointError:
            written = {}
        # output_dir stands as it was typed in a checkpoint, and absolute in the file.
        here, before = ({**each, "output_dir": None} for each in (there, written))
        keys = "; ".join(changes(before, here)[:6]) if written else ""
        raise ConfigError(
            f"{self.config_file} was changed after the run wrote it{': ' + keys if keys else ''}. Set keys on the command "
            f"line, as in `bomemeta resume {self.location} steps=N`, and put the file back; {anew}. To keep it as it is, take its "
            "last line out"
        )

    def read_result(self) -> tuple[dict[str, Any] | None, str | None]:
        """result.json, None where there is none that can be used; and what is wrong with it."""
        if self.result_file.is_fifo():  # a reader would wait for ever
            return None, f"{self.result_file} is a pipe; wanted the file that a run writes"
        return read_sealed(self.result_file) if self.result_file.exists() else (None, None)

    def identity(self) -> tuple[int, int]:
        """What tells this folder from another one at its path."""
        status = self.path.stat()
        return status.st_dev, status.st_ino

    def check_there(self, identity: tuple[int, int]) -> None:
        """Raises StorageError where the folder was moved or removed, or config.yaml in it."""
        try:
            there = self.identity() == identity and self.config_file.is_file()
        except OSError:
            there = False
        if not there:
            raise StorageError(
                f"the run folder {self.path} was moved or removed while the run was at work in it; the run stops. What was "
                "saved is where the folder is now: `bomemeta resume` it there, or put it back first"
            )

    def write_file(self, name: str, content: bytes) -> None:
        """Puts a file of the problem's own into the folder, or replaces it."""
        with naming(self.path / name), written_whole(self.path / name) as file:
            file.write(content)


def finite(value: Any) -> Any:
    """A value as JSON can have it: None in the place of NaN and infinite numbers, at any depth.
    A numpy number, as a user may have given for a field, is Python's.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _first_free(path: Path) -> Path:
    number = 1
    candidate = path
    while not _claim(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _claim(path: Path) -> bool:
    """Makes the folder ours: True where it was not there (only one process can make it) or was
    there and empty.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return path.is_dir() and not any(path.iterdir())
    return True


def _taken(location: Path | str, typed: Path | str) -> str:
    return (
        f"output_dir: {location} exists and is not empty; a run never overwrites another. "
        f"Resume it with `bomemeta resume {typed}`, or choose another output_dir"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # On the folder itself, so that no file is left. The system gives it back whenever and however
    # this process ends.
    if not installed(
        "fcntl"
    ):  # Windows, which has no lock of a folder: two at work are not noticed
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"output_dir: another process is at work in {path}. Wait for its end, or end it"
                    ) from error
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
