"""What a few-shot data set is: something that draws episodes, each a pure function of its key."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Split = Literal["train", "validation", "test"]


class EpisodeSpec(NamedTuple):
    """An episode's size: `ways` classes, `shots` support and `queries` query images of each."""

    ways: int
    shots: int
    queries: int


class Episode(NamedTuple):
    """One task. Images are float32 `[n, channels, height, width]` in [0, 1]; rows are sorted by
    label (a data set may give them in any order), labels int64 in 0..ways-1.
    """

    support: Tensor  # [ways * shots, C, H, W]
    support_labels: Tensor  # [ways * shots]
    query: Tensor  # [ways * queries, C, H, W]
    query_labels: Tensor  # [ways * queries]


class EpisodeSource(Protocol):
    """A data set registered in `bomemeta.registry.datasets`; its dataclass fields are the keys of
    the config's `data:` section. Before a run its first episodes of each split are looked at
    (`episode_check.py`).

    It may also have `value_range`, (lowest, highest) of its images' numbers where that is not
    (0, 1), `digest`, a text that tells its content from another's: a resumed run compares it, and
    `class_names(split, spec, key)`, the names of the classes of `episode`, in the order of its labels,
    for `bomemeta report`; `class_numbers(split, spec, key)`, int64 `[ways]`, the numbers of these classes
    among the `class_count(split, spec)` of the split, for `problem.auxiliary_weight`.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        ...

    def prepare(self) -> None:
        """Makes sure that the data is readable here (renders or reads it once, may fill a cache).
        Raises DataError saying how to get it.

        Called by the driver before any worker starts and by each worker when it starts; cheap the
        second time.
        """
        ...

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        """Raises DataError where the split has too few classes, or a class too few images, for such
        episodes.
        """
        ...

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        """The episode of this key: the same key gives the same bits in every process; no global
        random state is left changed.
        """
        ...
