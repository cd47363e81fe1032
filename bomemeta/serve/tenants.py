"""What a server keeps: one folder for each tenant, and in it one folder for each version of its
classifier, without the network, which all tenants share.

    TENANTS/NAME/7/classifier.json, head.safetensors, examples.safetensors

A version is written whole under another name and then renamed: of two that write the next version
one comes too late and begins again from the other's. So servers may share the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.predict.classifier import FewShotClassifier
from bomemeta.predict.model import TrainedModel
from bomemeta.predict.saving import DESCRIPTION, load, save

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
KEPT = 2  # versions: one that is being read may have just been replaced


class UnknownTenant(BomemetaError):
    """No such tenant."""


class TooLate(BomemetaError):
    """Another one wrote this version first."""


class Tenants:
    """The tenants of one folder, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser().absolute()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"tenants: {self._folder} cannot be made: {error.strerror}"
            ) from error

    def names(self) -> list[str]:
        """All tenants, sorted."""
        found = [path.name for path in self._folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(name for name in found if self._versions(name))

    def version(self, name: str) -> int:
        """The newest version. Raises UnknownTenant."""
        versions = self._versions(name)
        if not versions:
            raise UnknownTenant(f"there is no tenant {name!r} yet: fit makes one")
        return versions[-1]

    def load(self, name: str, version: int, model: TrainedModel) -> FewShotClassifier:
        """Raises ConfigError where it is damaged, or of another model."""
        return load(self._path(name) / str(version), model)

    def store(self, name: str, classifier: FewShotClassifier, after: int) -> int:
        """Writes the version that follows `after` (0: the first). Raises TooLate where it is there."""
        home = self._path(name)
        home.mkdir(exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".", dir=home))
        try:
            save(classifier, draft, examples=True, shared=True)
            os.rename(draft, home / str(after + 1))
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if (home / str(after + 1)).exists():
                raise TooLate(f"tenant {name} was changed meanwhile") from error
            raise ConfigError(f"tenants: {home} cannot be written: {error.strerror}") from error
        for old in self._versions(name)[:-KEPT]:
            shutil.rmtree(home / str(old), ignore_errors=True)
        return after + 1

    def delete(self, name: str) -> None:
        """Raises UnknownTenant."""
        self.version(name)
        shutil.rmtree(self._path(name))

    def about(self, name: str) -> dict[str, Any]:
        """A tenant's classes, examples of each, and bytes of its head. Raises UnknownTenant."""
        version = self.version(name)
        home = self._path(name) / str(version)
        known = json.loads((home / DESCRIPTION).read_text(encoding="utf-8"))
        counts = [
            {"class": cls, "examples": count}
            for cls, count in zip(known["classes"], known["examples_per_class"], strict=True)
        ]
        size = (home / "head.safetensors").stat().st_size
        return {"tenant": name, "version": version, "classes": counts, "head_bytes": size}

    def _versions(self, name: str) -> list[int]:
        home = self._path(name)
        if not home.is_dir():
            return []
        numbers = [int(path.name) for path in home.iterdir() if path.name.isdecimal()]
        return sorted(n for n in numbers if (home / str(n) / DESCRIPTION).is_file())

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"tenant: got {name!r}; wanted 1 to 64 letters, digits, - and _, not - or _ first"
            )
        return self._folder / name
