"""From a decoded picture to the square of bytes a model is fed.

Nothing here draws a random number: crops take their uniforms as arguments (see ``counter``), so a
sample is cut the same way wherever and whenever it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.errors import UserError

Pixels = NDArray[np.uint8]
Transform = Callable[[Image.Image, Sequence[float]], Pixels]
"""(picture, two uniforms in [0, 1)) -> bytes (H, W, 3), the same H and W for every picture."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels of eight bits: grey is repeated, CMYK converted, transparency dropped.

    Raises:
        ValueError: the pixels are no integers of up to 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range nobody knows")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        if (values > 0xFFFF).any():
            raise ValueError("its pixels have more than 16 bits")
        grey = np.clip(values >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` the ADM way: halve with a box filter, then bicubic.

    Source: the evaluation preprocessing of Dhariwal and Nichol, "Diffusion models beat GANs"
    (2021), which published FID numbers on ImageNet rest on.
    """
    image = _halved(image, size)
    return image.resize(_rounded_to(image, size), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Pixels:
    """The ADM centre crop: shorter side to ``size``, then the middle square.

    Returns:
        Bytes (size, size, 3).
    """
    image = resize_short_side(to_rgb(image), size)
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def resize_random_crop(image: Image.Image, size: int, u: Sequence[float]) -> Pixels:
    """Shorter side to 1.5 x ``size`` (384 for 256) by bicubic, then a square anywhere in it.

    Source: the first-stage recipe of RAE (Zheng et al. 2025).

    Args:
        image: any picture.
        size: pixels of the square.
        u: two uniforms in [0, 1), where the square lies across and down.

    Returns:
        Bytes (size, size, 3).
    """
    image = to_rgb(image)
    target = _scaled_to(image, size * 3 // 2)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    return _cut(image, *_anywhere(target, size, u), size)


def fast_center_crop(image: Image.Image, size: int) -> Pixels:
    """``center_crop`` that resizes only what it keeps: some pixels differ by 1 of 255."""
    image = _halved(to_rgb(image), size)
    target = _rounded_to(image, size)
    return _resized_part(image, target, (target[0] - size) // 2, (target[1] - size) // 2, size)


def fast_resize_random_crop(image: Image.Image, size: int, u: Sequence[float]) -> Pixels:
    """``resize_random_crop`` that resizes only what it keeps: some pixels differ by 1 of 255."""
    image = to_rgb(image)
    target = _scaled_to(image, size * 3 // 2)
    return _resized_part(image, target, *_anywhere(target, size, u), size)


def flip(pixels: Pixels) -> Pixels:
    """Left and right exchanged, of (H, W, C)."""
    return pixels[:, ::-1]


@dataclass(frozen=True)
class CenterCrop:
    """``center_crop``, or the fast one, as a transform for the stream; it draws nothing."""

    size: int
    fast: bool = False

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Pixels:
        """Bytes (size, size, 3)."""
        return (fast_center_crop if self.fast else center_crop)(image, self.size)


@dataclass(frozen=True)
class ResizeRandomCrop:
    """``resize_random_crop``, or the fast one, as a transform for the stream."""

    size: int
    fast: bool = False

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Pixels:
        """Bytes (size, size, 3)."""
        return (fast_resize_random_crop if self.fast else resize_random_crop)(image, self.size, u)


def make_transform(crop: Literal["center", "random"], size: int) -> Transform:
    """The transform that the setting ``data.crop`` names, at ``data.image_size``."""
    if size < 1:
        raise UserError(f"data.image_size is {size}; it must be at least 1")
    if crop == "center":
        return CenterCrop(size, fast=True)
    if crop == "random":
        return ResizeRandomCrop(size, fast=True)
    raise UserError(f"data.crop is {crop!r}; it must be 'center' or 'random'")


def _halved(image: Image.Image, size: int) -> Image.Image:
    """Halved until the shorter side is below twice ``size``."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _rounded_to(image: Image.Image, short: int) -> tuple[int, int]:
    """Width and height with a shorter side of ``short``, as ADM rounds them."""
    scale = short / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _scaled_to(image: Image.Image, short: int) -> tuple[int, int]:
    """Width and height with a shorter side of ``short``, as torchvision rounds them."""
    shorter = min(image.size)
    return short * image.width // shorter, short * image.height // shorter


def _anywhere(target: tuple[int, int], size: int, u: Sequence[float]) -> tuple[int, int]:
    """Left and top of a square in a picture of ``target`` width and height."""
    return (
        math.floor(u[0] * (target[0] - size + 1)),
        math.floor(u[1] * (target[1] - size + 1)),
    )


def _cut(image: Image.Image, left: int, top: int, size: int) -> Pixels:
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resized_part(
    image: Image.Image, target: tuple[int, int], left: int, top: int, size: int
) -> Pixels:
    """A square of the picture resized to ``target``, without the rest of it."""
    if target == image.size:
        return _cut(image, left, top, size)
    across, down = image.width / target[0], image.height / target[1]
    # Pillow resizes a whole picture across and then down, rounding to 8 bits between the two; of a
    # part it may go the other way round, where that is less work. So: one after the other.
    reach = 2 * max(down, 1) + 1  # rows of the original that a bicubic row looks at, and one more
    first = max(0, math.floor(top * down - reach))
    last = min(image.height, math.ceil((top + size) * down + reach))
    if (first, last) != (0, image.height):
        image = image.crop((0, first, image.width, last))
    columns = (left * across, 0, min((left + size) * across, image.width), last - first)
    image = image.resize((size, last - first), Image.Resampling.BICUBIC, columns)
    rows = (0, top * down - first, size, min((top + size) * down - first, last - first))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, rows))
