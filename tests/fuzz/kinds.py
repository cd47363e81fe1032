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
    "config": Kind(configs.config, 30),
    "override": Kind(configs.override, 20),
    "tune": Kind(configs.tune, 8),
    "npz": Kind(data_files.archive, 22),
    "checkpoint": Kind(folders.checkpoint, 12),
    "folder": Kind(folders.run_folder, 8),
    "images": Kind(pictures.folder, 5),
    "episodes": Kind(sources.episodes, 6),
    "items": Kind(sources.items, 6),
    "tasks": Kind(sources.tasks, 2),
}


def shares(count: int, only: str | None = None) -> dict[str, int]:
    """How many inputs of each kind."""
    if only is not None:
        return {only: count}
    return {name: count * kind.percent // 100 for name, kind in KINDS.items()}
