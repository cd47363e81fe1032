"""Image files of any mode as uint8 arrays of one size.

Pillow is imported when a file is decoded: `import bomemeta` and the registry stay light.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bomemeta.boundary import refusing
from bomemeta.errors import DataError
from bomemeta.limits import available_memory, size_text

if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["crop", "stretch", "pad"]
Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # height, width

# Where a photograph is this many times larger than wanted, a JPEG is decoded at a fraction of its
# size: several times faster, and far above what the final resize needs.
DRAFT_FACTOR = 4
SIXTEEN_BITS = 65535
LARGE = 2**28  # bytes: of less than this nobody asks whether they are free
BYTES_PER_PIXEL = 8  # as RGBA, once before and once after what is transparent is made white


class UnreadableImage(DataError):
    """One file that is not an image that can be used; the message says why."""


def content_of(path: Path) -> bytes:
    """A file's bytes. Raises UnreadableImage, also for a pipe or a device, which have no end."""
    with refusing(UnreadableImage):
        if path.exists() and not path.is_file():
            raise UnreadableImage("a folder, a pipe or a device; wanted a file")
        return path.read_bytes()


def decode(data: bytes, size: Size, channels: int, resize: Resize) -> Pixels:
    """The image in a file's bytes as uint8 `[channels, height, width]`. Raises UnreadableImage."""
    with refusing(UnreadableImage), _opened(data) as image:
        if min(image.size) > DRAFT_FACTOR * max(size):
            image.draft(None, (DRAFT_FACTOR * size[1], DRAFT_FACTOR * size[0]))
        wanted = math.prod(image.size) * BYTES_PER_PIXEL
        memory = available_memory() if wanted > LARGE else None
        if memory is not None and wanted > memory:
            raise UnreadableImage(
                f"it says that it is {image.width} x {image.height} pixels, which takes {size_text(wanted)}; this "
                f"machine has {size_text(memory)} free"
            )
        return pixels_of(image, size, channels, resize)


def _opened(data: bytes) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its message is an address in memory
        raise UnreadableImage("it is no image, or of a kind that Pillow does not read") from error


def pixels_of(image: Image.Image, size: Size, channels: int, resize: Resize) -> Pixels:
    """A Pillow image of any mode as uint8 `[channels, height, width]`, turned upright as its EXIF
    entry says. Raises UnreadableImage where the mode has no meaning as an image.

    crop: the shorter side fits, the middle of the other is kept. stretch: both sides fit. pad: the
    longer side fits, the rest is black.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    flat = _opaque(_eight_bits(upright))
    flat = flat.convert("L" if channels == 1 else "RGB")
    wanted = (size[1], size[0])  # Pillow's order
    how = Image.Resampling.BILINEAR
    if resize == "crop":
        flat = ImageOps.fit(flat, wanted, how)
    elif resize == "pad":
        flat = ImageOps.pad(flat, wanted, how)
    else:
        flat = flat.resize(wanted, how)
    array = np.asarray(flat, np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def pillow_image(value: Any) -> Image.Image:
    """A Pillow image of an image in memory: a Pillow image, an array `[H, W]`, `[H, W, C]`, or a
    tensor `[C, H, W]`, `[H, W]`; uint8, or floats in [0, 1]. Raises UnreadableImage.
    """
    import torch
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    tensor = isinstance(value, torch.Tensor)
    with refusing(lambda why: UnreadableImage(f"got {type(value).__name__}, no array ({why})")):
        array = value.detach().cpu().numpy() if tensor else np.asarray(value)
    if array.ndim == 3 and tensor:
        array = array.transpose(1, 2, 0)
    if (
        array.size == 0
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
    ):
        order = "[C, H, W]" if tensor else "[H, W, C]"
        raise UnreadableImage(
            f"got an array of shape {tuple(np.shape(value))}; wanted [H, W] or {order} with C = 1, 3 or 4"
        )
    if array.dtype.kind == "f":
        if array.size and (not np.isfinite(array).all() or array.min() < 0 or array.max() > 1):
            raise UnreadableImage(
                f"got floats from {array.min():g} to {array.max():g}; wanted floats in [0, 1], or uint8"
            )
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise UnreadableImage(f"got {array.dtype}; wanted uint8, or floats in [0, 1]")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit images scaled to 8: `convert` would clip them instead."""
    from PIL import Image

    if image.mode == "F":
        raise UnreadableImage("32-bit floats, whose white is not known; wanted 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    array = np.asarray(image).astype(np.int64)
    if array.size and (array.min() < 0 or array.max() > SIXTEEN_BITS):
        raise UnreadableImage(f"values from {array.min()} to {array.max()}; wanted 8 or 16 bits")
    return Image.fromarray(np.round(array * (255 / SIXTEEN_BITS)).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """What is transparent becomes white, as on a page: black ink on nothing would vanish else."""
    from PIL import Image

    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
