"""Random changes of training images, with an episode's key as the only source of randomness.

torchvision's transforms draw from torch's global generator. It is set for the time of the change
and put back, under a lock, since a worker may load ahead in a thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bomemeta.boundary import refusing
from bomemeta.errors import DataError

Augmentation = Literal["none", "flip_crop", "colour"]
Transform = Callable[[Tensor], Tensor]

_lock = threading.Lock()


@functools.cache
def named_transform(name: Augmentation, height: int, width: int) -> Transform:
    """For one uint8 image `[C, H, W]`. flip_crop: mirrored, and moved by up to an eighth of its
    side; colour: brightness, contrast and saturation too (the jitter of 0.4 of LibFewShot).
    """
    from torchvision.transforms import v2

    moves = [
        v2.RandomCrop((height, width), padding=max(height, width) // 8, padding_mode="reflect"),
        v2.RandomHorizontalFlip(),
    ]
    if name == "colour":
        moves.append(v2.ColorJitter(0.4, 0.4, 0.4))
    composed: Transform = v2.Compose(moves)
    return composed


def augmented(images: Tensor, transform: Transform, seed: int) -> Tensor:
    """Each of uint8 `[n, C, H, W]` changed by `transform`, a function of `seed` alone. Raises DataError
    where that fails or gives something else.
    """
    shape = list(images.shape[1:])

    def refused(why: str) -> DataError:
        return DataError(f"augmentation: on an image, uint8 {shape}, it failed: {why}")

    with _lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with refusing(refused):
            made = [transform(image) for image in images]
    for image in made:
        if (
            not isinstance(image, Tensor)
            or list(image.shape) != shape
            or image.dtype != torch.uint8
        ):
            got = (
                f"{image.dtype} {list(image.shape)}"
                if isinstance(image, Tensor)
                else type(image).__name__
            )
            raise DataError(
                f"augmentation: gave {got} for uint8 {shape}. Wanted uint8 of that shape"
            )
    return torch.stack(made)
