"""From a picture as it was found to the bytes that stand for it in a shard."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.data.reader import DECODE_ERRORS
from rae_xla.data.transforms import resize_short_side, to_rgb
from rae_xla.errors import UserError

Resize = Literal["adm", "bicubic"]

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""What is put into a shard byte by byte, and its extension there; the rest is encoded anew."""


@dataclass(frozen=True)
class ShardSample:
    """An encoded image (the bytes of a PNG, JPEG, …), its file extension, and its label."""

    image: bytes
    extension: str
    label: int


@dataclass(frozen=True)
class Encoding:
    """What becomes of images on their way into a shard.

    Args:
        image_size: pixels; larger images are made so small that the shorter side is this long.
            None, and whatever is small enough already, keeps the image byte by byte.
        resize: how: ``adm`` halves with a box filter first, so that the centre crop of what is
            stored is that of the original; ``bicubic`` is one bicubic step, as stage 1 takes.
        quality: store what is encoded anew as JPEG of this quality (1 to 100) rather than as PNG.

    Raises:
        UserError: if a value is out of its range.
    """

    image_size: int | None = None
    resize: Resize = "adm"
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size is {self.image_size}; it must be at least 1")
        if self.resize not in get_args(Resize):
            raise UserError(f"--resize is {self.resize!r}; it must be 'adm' or 'bicubic'")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; it must lie in 1 to 100")

    def of_file(self, content: bytes, label: int, where: str) -> ShardSample:
        """The sample made of an image file's bytes.

        Raises:
            UserError: naming ``where``, if they do not decode.
        """
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                kept = KEPT_FORMATS.get(image.format or "")
                if kept and not self._too_large(image):
                    return ShardSample(content, kept, label)
                return self._encoded(image, label)
        except DECODE_ERRORS as error:
            raise UserError(
                f"{where}: not a readable image ({error}); mend it or move it away"
            ) from None

    def of_pixels(self, pixels: NDArray[np.uint8], label: int) -> ShardSample:
        """The sample made of bytes (H, W) or (H, W, 3)."""
        return self._encoded(Image.fromarray(pixels), label)

    def _too_large(self, image: Image.Image) -> bool:
        return self.image_size is not None and min(image.size) > self.image_size

    def _encoded(self, image: Image.Image, label: int) -> ShardSample:
        if self.image_size is not None and self._too_large(image):
            shorten = resize_short_side if self.resize == "adm" else _bicubic_short_side
            image = shorten(to_rgb(image), self.image_size)
        elif image.mode not in ("L", "RGB"):
            image = to_rgb(image)
        buffer = io.BytesIO()
        if self.quality is None:
            image.save(buffer, "PNG")
            return ShardSample(buffer.getvalue(), "png", label)
        image.save(buffer, "JPEG", quality=self.quality)
        return ShardSample(buffer.getvalue(), "jpg", label)


def _bicubic_short_side(image: Image.Image, size: int) -> Image.Image:
    """One bicubic step to sides rounded down, as stage 1 does (``resize_random_crop``)."""
    shorter = min(image.size)
    target = (size * image.width // shorter, size * image.height // shorter)
    return image.resize(target, Image.Resampling.BICUBIC)


ORIGINALS = Encoding()
"""Every image as it is."""
