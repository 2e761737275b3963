"""Encode images for a shard: keep the file, or resize and encode it."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.data.image_decoding import (
    ROTATED,
    ImageError,
    open_image,
    to_rgb,
    upright,
)
from rae_xla.data.image_finder import ImageNotes
from rae_xla.data.transforms import resize_short_side
from rae_xla.errors import UserError

Resize = Literal["adm", "bicubic"]

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are stored unchanged, and their extensions; other formats are re-encoded. (MPO is a
JPEG that a second image follows, as phones write it.)"""


@dataclass(frozen=True)
class ShardSample:
    """A sample of a shard.

    Attributes:
        image: encoded, as PNG, JPEG, …
        extension: of its file.
        label: number of its class.
        notes: what is not read of the image's file, if anything.
        texts: of the sample as JSON, by the extension of their member; written in place of the
            label.
    """

    image: bytes
    extension: str
    label: int
    notes: ImageNotes | None = None
    texts: bytes | None = None


@dataclass(frozen=True)
class Encoding:
    """How images are encoded for a shard.

    Args:
        image_size: in pixels; larger images are resized so that the shorter side has this length.
            None: no image is resized. Images that are not resized are stored unchanged.
        resize: ``adm`` halves with a box filter first, so that the stored image and the original
            have the same centre crop; ``bicubic`` is one bicubic step, as in stage 1.
        quality: encode images as JPEG of this quality (1 to 100) rather than as PNG.
        upright: rotate and mirror images as their EXIF data say; they are encoded again.

    Raises:
        UserError: a value is out of range.
    """

    image_size: int | None = None
    resize: Resize = "adm"
    quality: int | None = None
    upright: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size is {self.image_size}; it must be at least 1")
        if self.resize not in get_args(Resize):
            raise UserError(f"--resize is {self.resize!r}; it must be 'adm' or 'bicubic'")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; it must be in 1 to 100")

    def of_file(self, content: bytes, label: int, where: str) -> ShardSample:
        """Return the sample for the content of an image file.

        Args:
            content: of the file.
            label: of the sample.
            where: the origin of the file, for error messages.

        Raises:
            UserError: the image does not decode.
        """
        try:
            notes = ImageNotes()
            with open_image(content, where, notes) as image:
                to_rgb(image)  # checks the pixels, also of an image that is stored unchanged
                if self.upright and notes.counts.pop(ROTATED, 0):
                    sample = self._encode(upright(image), label)
                else:
                    sample = self._of_image(image, content, label)
                return replace(sample, notes=notes) if notes.counts else sample
        except ImageError as error:
            raise UserError(
                f"{where}: not a readable image ({error}); repair it or move it away"
            ) from None

    def of_pixels(self, pixels: NDArray[np.uint8], label: int) -> ShardSample:
        """Return the sample for pixels, uint8 (H, W) or (H, W, 3)."""
        return self._encode(Image.fromarray(pixels), label)

    def _of_image(self, image: Image.Image, content: bytes, label: int) -> ShardSample:
        kept = KEPT_FORMATS.get(image.format or "")
        if kept and not self._too_large(image):
            return ShardSample(content, kept, label)
        return self._encode(image, label)

    def _too_large(self, image: Image.Image) -> bool:
        return self.image_size is not None and min(image.size) > self.image_size

    def _encode(self, image: Image.Image, label: int) -> ShardSample:
        if self.image_size is not None and self._too_large(image):
            resize = resize_short_side if self.resize == "adm" else _bicubic_short_side
            image = resize(to_rgb(image), self.image_size)
        elif image.mode not in ("L", "RGB"):
            image = to_rgb(image)
        buffer = io.BytesIO()
        if self.quality is None:
            image.save(buffer, "PNG")
            return ShardSample(buffer.getvalue(), "png", label)
        image.save(buffer, "JPEG", quality=self.quality)
        return ShardSample(buffer.getvalue(), "jpg", label)


def _bicubic_short_side(image: Image.Image, size: int) -> Image.Image:
    """Resize in one bicubic step, and round down, as ``resize_random_crop`` does."""
    shorter = min(image.size)
    target = (size * image.width // shorter, size * image.height // shorter)
    return image.resize(target, Image.Resampling.BICUBIC)


ORIGINALS = Encoding()
"""Store every image unchanged."""
