"""An experiment's folder: a marker that says what it is of, one JSON file per finished run, then
tables and a figure.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.files import written_whole
from bomemeta.paths import absolute, real
from bomemeta.reproduce.experiment import PaperRun, Record

MARKER = "experiment.json"
# Whoever changes what a record holds raises this: records of another number are run again.
LAYOUT = 1


class Folder:
    """Opened for one experiment, which `identity` tells from others. Raises ConfigError where
    something else lies there.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = real(absolute(path, what="--out"))
        self._check(identity)
        try:
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out: {error.filename} cannot be written: {error.strerror}"
            ) from error
        self.write(MARKER, json.dumps(dict(identity), indent=1) + "\n")

    def _check(self, identity: Mapping[str, Any]) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"--out: {self.path} is a file; name a folder")
        marker = self.path / MARKER
        if not marker.exists():
            if any(self.path.iterdir()):
                raise ConfigError(
                    f"--out: {self.path} holds something that is not an experiment's; nothing is written over. Choose another --out"
                )
            return
        found = _read(marker)
        if found != dict(identity):
            raise ConfigError(
                f"--out: {self.path} holds another experiment, {_described(found)}; this one is {_described(identity)}. Choose another "
                "--out"
            )

    def load(self, run: PaperRun) -> Record | None:
        """The record of this run with these settings, if it is there; one of other settings counts
        as none.
        """
        found = _read(self._file(run.name))
        if found.get("layout") != LAYOUT or found.get("settings") != run.settings():
            return None
        return Record(**{field.name: found[field.name] for field in dataclasses.fields(Record)})

    def save(self, record: Record) -> None:
        self.write(
            f"runs/{record.name}.json",
            json.dumps({"layout": LAYOUT, **dataclasses.asdict(record)}, indent=1) + "\n",
        )

    def write(self, name: str, text: str | bytes) -> None:
        path = self.path / name
        try:
            with written_whole(path) as file:
                file.write(text.encode() if isinstance(text, str) else text)
        except OSError as error:
            raise BomemetaError(
                f"{path} could not be written: {error.strerror or error}. See to the disk and run again"
            ) from error

    def _file(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.json"


def _read(path: Path) -> dict[str, Any]:
    """{} where there is no such file or it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(identity: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in identity.items())
        or "whose marker cannot be read"
    )
