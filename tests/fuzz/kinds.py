"""The kinds of input, and how many of a hundred are of each."""

from __future__ import annotations

from typing import NamedTuple

import sklearn.datasets  # noqa: F401  an import that a time limit cuts short stays half done

from fuzz import configs, data_files, folders, pictures, sources
from fuzz.outcome import Target


class Kind(NamedTuple):
    target: Target
    percent: int


KINDS = {
    "config": Kind(configs.config, 25),
    "override": Kind(configs.override, 17),
    "tune": Kind(configs.tune, 7),
    "npz": Kind(data_files.archive, 17),
    "checkpoint": Kind(folders.checkpoint, 10),
    "folder": Kind(folders.run_folder, 6),
    "images": Kind(pictures.folder, 5),
    "episodes": Kind(sources.episodes, 6),
    "items": Kind(sources.items, 5),
    "tasks": Kind(sources.tasks, 2),
}


def shares(count: int, only: str | None = None) -> dict[str, int]:
    """How many inputs of each kind."""
    if only is not None:
        return {only: count}
    return {name: count * kind.percent // 100 for name, kind in KINDS.items()}
