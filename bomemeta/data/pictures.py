"""Which picture a row of numbers is: its channels, height and width, and where its channels lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from bomemeta.errors import ConfigError

Channels = Literal["first", "last"]
MOST_CHANNELS = 4  # RGBA: an axis as short as this is taken for the channels


class Picture(NamedTuple):
    """How rows are folded to pictures and back."""

    channels: int
    height: int
    width: int
    channels_last: bool = False  # a row is [H, W, C], else [C, H, W]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def fold(self, rows: Tensor) -> Tensor:
        """Rows `[n, d]` as pictures `[n, C, H, W]`."""
        if self.channels_last:
            return rows.reshape(-1, self.height, self.width, self.channels).movedim(-1, 1)
        return rows.reshape(-1, *self.shape)

    def flat(self, pictures: Tensor) -> Tensor:
        """Pictures `[n, C, H, W]` as rows `[n, d]`."""
        return (pictures.movedim(1, -1) if self.channels_last else pictures).flatten(1)


def picture_of_row(row: Sequence[int], channels: Channels | None) -> Picture | str:
    """The picture of a row of this shape: [H, W], [H, W, C] or [C, H, W]; else why it is none.

    `channels` says which of the last two it is; None: the channels are the one axis of 1 to 4.
    """
    if len(row) == 2:
        return Picture(1, row[0], row[1])
    if len(row) != 3:
        return f"a row is {list(row)}, and its height and width are not known"
    if channels is None:
        first, last = row[0] <= MOST_CHANNELS, row[2] <= MOST_CHANNELS
        if first == last:
            return f"a row is {list(row)}, and which axis has the channels is not known"
        channels = "first" if first else "last"
    if channels == "first":
        return Picture(row[0], row[1], row[2])
    return Picture(row[2], row[0], row[1], channels_last=True)


def picture_or_none(data: Any) -> Picture | None:
    """The picture of a data set's rows where that is known."""
    if not hasattr(data, "picture"):
        return None
    found: Picture | str = data.picture()
    return found if isinstance(found, Picture) else None


def picture_of(data: Any, wanted_for: str) -> Picture:
    """The picture of a data set's rows: what its `picture()` gives, or its `image_shape` (channels
    first). Raises ConfigError where it has neither, or they do not fit its rows.
    """
    name = type(data).__name__
    if hasattr(data, "picture"):
        found: Picture | str = data.picture()
        if isinstance(found, str):
            raise ConfigError(f"{wanted_for} wants pictures; {name}: {found}")
        return found
    shape = getattr(data, "image_shape", None)
    if shape is None:
        raise ConfigError(
            f"{wanted_for} wants pictures; {name} has rows of {data.features} numbers and no `image_shape` (channels, height, width). "
            "Add one to the class"
        )
    if len(shape) != 3 or math.prod(shape) != data.features:
        raise ConfigError(
            f"{wanted_for} wants pictures; {name}.image_shape is {tuple(shape)} and a row has {data.features} numbers; wanted "
            "(channels, height, width) of that product"
        )
    return Picture(*shape)
