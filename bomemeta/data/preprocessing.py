"""From an image, wherever it comes from, to what a network is given: the same in training and in
prediction.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bomemeta.data.image_decoding import (
    Pixels,
    Resize,
    UnreadableImage,
    content_of,
    decode,
    pillow_image,
    pixels_of,
)
from bomemeta.errors import DataError

# Of ImageNet's training images, as torchvision's models expect them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes float32 `[channels, height, width]`: (pixel / 255 - mean) / std."""

    channels: int
    height: int
    width: int
    resize: Resize = "crop"
    mean: tuple[float, ...] = ()  # [channels]; none: pixels stay in [0, 1]
    std: tuple[float, ...] = ()

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Images (paths, Pillow images, arrays `[H, W, C]` or `[H, W]`, tensors `[C, H, W]`; uint8,
        or floats in [0, 1]) as float32 `[n, C, H, W]`. Raises DataError that names the one that
        cannot be read.
        """
        pixels = [self.pixels(image, i) for i, image in enumerate(images)]
        shape = (0, self.channels, self.height, self.width)
        return self.floats(
            torch.from_numpy(np.stack(pixels) if pixels else np.empty(shape, np.uint8))
        )

    def pixels(self, image: Any, number: int | None = None) -> Pixels:
        """One image as uint8 `[C, H, W]`. `number`: what a message calls it, where it has no path."""
        size = (self.height, self.width)
        try:
            if isinstance(image, str | os.PathLike):
                return decode(content_of(Path(image)), size, self.channels, self.resize)
            if isinstance(image, bytes):
                return decode(image, size, self.channels, self.resize)
            return pixels_of(pillow_image(image), size, self.channels, self.resize)
        except UnreadableImage as error:
            what = (
                image
                if isinstance(image, str | os.PathLike)
                else "an image"
                if number is None
                else f"image {number}"
            )
            raise DataError(f"{what} cannot be read: {error}") from error

    def floats(self, pixels: Tensor) -> Tensor:
        """uint8 `[n, C, H, W]` as normalised float32."""
        return self.normalised(pixels.float().div_(255))

    def normalised(self, images: Tensor) -> Tensor:
        """(images - mean) / std of float32 `[n, C, H, W]` in [0, 1]."""
        if not self.mean:
            return images
        centred = images - torch.tensor(self.mean)[:, None, None]
        return centred / torch.tensor(self.std)[:, None, None]

    def in_unit_range(self, images: Tensor) -> Tensor:
        """The inverse of `normalised`, in [0, 1]."""
        if self.mean:
            images = images * torch.tensor(self.std)[:, None, None]
            images = images + torch.tensor(self.mean)[:, None, None]
        return images.clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def preprocessing_of(dataset: Any) -> Preprocessing:
    """The data set's own preprocessing, or, where it has none, its image shape and pixels in
    [0, 1].
    """
    own = getattr(dataset, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own
    channels, height, width = dataset.image_shape
    return Preprocessing(channels=channels, height=height, width=width, resize="stretch")
