"""Texts in domains, as bytes: what an installation of Python and of our dependencies carries, so that a
language model can be trained without a download.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bomemeta.boundary import refusing
from bomemeta.errors import DataError
from bomemeta.paths import absolute
from bomemeta.registry import datasets

Bytes = NDArray[np.uint8]
# Distributions that are there wherever bomemeta is, whose licences make a domain.
LICENSED = ("torch", "numpy", "pydantic", "pydantic-core", "PyYAML", "typing-extensions")


@runtime_checkable
class TextDomains(Protocol):
    """A data set of texts by domain."""

    def prepare(self) -> None:
        """Reads the texts. Raises DataError where one is missing. Cheap the second time."""
        ...

    @property
    def texts(self) -> Mapping[str, Bytes]:
        """Every domain's bytes; the same arrays each time, not to be written into."""
        ...


@datasets.register("installed_texts")
@dataclass(frozen=True, kw_only=True)
class InstalledTexts:
    """Domains `english` (the help texts of pydoc), `python` (the standard library's sources), `licences`
    (of our dependencies) and `shuffled` (bytes of these three in random order: nothing to learn but
    how often each occurs).

    The texts are those of the installation: other versions of Python or torch give other ones, so
    all workers need the same. `files` adds domains, or replaces some: a path by name.
    """

    domain_bytes: Annotated[int, Field(ge=1000)] = 400_000  # of each domain, at most
    files: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        _ = self.texts

    @functools.cached_property
    def texts(self) -> Mapping[str, Bytes]:
        # Kept by the instance: a file that is replaced under a run does not change the run's data.
        return _read(self.domain_bytes, self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "texts"}


def _read(most: int, files: Mapping[str, str]) -> Mapping[str, Bytes]:
    found = {"english": _english(), "python": _python(most), "licences": _licences()}
    texts = {name: np.frombuffer(text[:most], np.uint8) for name, text in found.items()}
    everything = np.concatenate(list(texts.values()))
    texts["shuffled"] = np.random.default_rng(0).permutation(everything)[:most]
    for name, given in sorted(files.items()):
        path = absolute(given, what=f"data.files.{name}")
        if not path.is_file():  # a pipe or a device has no end
            raise DataError(
                f"data.files.{name}: {path} is no file. Name a text file that is on every machine that has workers"
            )
        with refusing(functools.partial(_unreadable, name, path)), path.open("rb") as file:
            texts[name] = np.frombuffer(file.read(most), np.uint8)
    if short := [name for name, text in texts.items() if len(text) < 1000]:
        raise DataError(
            f"installed_texts: {', '.join(short)} has fewer than 1,000 bytes here; name files of text with data.files"
        )
    return texts


def _unreadable(name: str, path: Path, why: str) -> DataError:
    return DataError(f"data.files.{name}: {path} cannot be read: {why}")


def _english() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def _python(most: int) -> bytes:
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= most:
            break
    return b"\n".join(parts)


def _licences() -> bytes:
    parts: list[bytes] = []
    for name in LICENSED:
        try:
            listed = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = sorted(
            file for file in listed if file.name.upper().startswith(("LICEN", "NOTICE"))
        )
        parts += [
            path.read_bytes() for file in wanted if (path := Path(str(file.locate()))).is_file()
        ]
    return b"\n".join(parts)
