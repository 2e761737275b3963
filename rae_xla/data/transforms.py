"""The transforms from an image to a model's input.

The transforms do not generate random numbers: crops take uniforms as arguments (see
``counter_rng``), so a sample is cropped the same way wherever and whenever it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.data.image_decoding import to_rgb
from rae_xla.errors import UserError

Pixels = NDArray[np.uint8]
Transform = Callable[[Image.Image, Sequence[float]], Pixels]
"""(image, two uniforms in [0, 1)) -> uint8 (H, W, 3), with the same H and W for every image."""


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` as ADM does: halve with a box filter, then bicubic.

    Source: the evaluation preprocessing of Dhariwal and Nichol, "Diffusion models beat GANs"
    (2021), which published FID values on ImageNet use.
    """
    image = _halve(image, size)
    return image.resize(_adm_size(image, size), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Pixels:
    """Return ADM's centre crop, uint8 (size, size, 3): resize the shorter side, crop the middle."""
    image = resize_short_side(to_rgb(image), size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def resize_random_crop(image: Image.Image, size: int, u: Sequence[float]) -> Pixels:
    """Resize the shorter side to 1.5 x ``size`` (384 for 256, bicubic), then crop at random.

    Source: the first-stage recipe of RAE (Zheng et al. 2025).

    Args:
        image: any image.
        size: side of the crop in pixels.
        u: two uniforms in [0, 1): horizontal and vertical position of the crop.

    Returns:
        uint8 (size, size, 3).
    """
    image = to_rgb(image)
    target = _torchvision_size(image, size * 3 // 2)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    return _crop(image, *_random_position(target, size, u), size)


def fast_center_crop(image: Image.Image, size: int) -> Pixels:
    """Like ``center_crop``, but resize only what is kept; some pixels differ by 1 of 255."""
    image = _halve(to_rgb(image), size)
    target = _adm_size(image, size)
    return _resize_part(image, target, (target[0] - size) // 2, (target[1] - size) // 2, size)


def fast_resize_random_crop(image: Image.Image, size: int, u: Sequence[float]) -> Pixels:
    """Like ``resize_random_crop``, but resize only what is kept; some pixels differ by 1 of 255."""
    image = to_rgb(image)
    target = _torchvision_size(image, size * 3 // 2)
    return _resize_part(image, target, *_random_position(target, size, u), size)


def flip(pixels: Pixels) -> Pixels:
    """Flip an array (H, W, C) horizontally."""
    return pixels[:, ::-1]


@dataclass(frozen=True)
class CenterCrop:
    """``center_crop``, or its fast version, as a ``Transform``; the uniforms are ignored."""

    size: int
    fast: bool = False

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Pixels:
        """Return the crop, uint8 (size, size, 3)."""
        return (fast_center_crop if self.fast else center_crop)(image, self.size)


@dataclass(frozen=True)
class ResizeRandomCrop:
    """``resize_random_crop``, or its fast version, as a ``Transform``."""

    size: int
    fast: bool = False

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Pixels:
        """Return the crop, uint8 (size, size, 3)."""
        return (fast_resize_random_crop if self.fast else resize_random_crop)(image, self.size, u)


def make_transform(crop: Literal["center", "random"], size: int) -> Transform:
    """Return the training transform for ``data.crop`` and ``data.image_size``.

    Raises:
        UserError: a value is invalid.
    """
    if size < 1:
        raise UserError(f"data.image_size is {size}; it must be at least 1")
    if crop == "center":
        return CenterCrop(size, fast=True)
    if crop == "random":
        return ResizeRandomCrop(size, fast=True)
    raise UserError(f"data.crop is {crop!r}; it must be 'center' or 'random'")


def _halve(image: Image.Image, size: int) -> Image.Image:
    """Halve the image until its shorter side is below twice ``size``."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _adm_size(image: Image.Image, short: int) -> tuple[int, int]:
    """Return width and height for a shorter side of ``short``, rounded as ADM does."""
    scale = short / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _torchvision_size(image: Image.Image, short: int) -> tuple[int, int]:
    """Return width and height for a shorter side of ``short``, rounded as torchvision does."""
    shorter = min(image.size)
    return short * image.width // shorter, short * image.height // shorter


def _random_position(target: tuple[int, int], size: int, u: Sequence[float]) -> tuple[int, int]:
    """Return left and top of a random square in an image of ``target`` width and height."""
    return (
        math.floor(u[0] * (target[0] - size + 1)),
        math.floor(u[1] * (target[1] - size + 1)),
    )


def _crop(image: Image.Image, left: int, top: int, size: int) -> Pixels:
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resize_part(
    image: Image.Image, target: tuple[int, int], left: int, top: int, size: int
) -> Pixels:
    """Return a square of the image resized to ``target``, without computing the rest."""
    if target == image.size:
        return _crop(image, left, top, size)
    across, down = image.width / target[0], image.height / target[1]
    # Pillow resizes an image horizontally and then vertically, rounding to 8 bits in between. For a
    # part of it, it may choose the other order if that is less work. So both steps are explicit.
    reach = 2 * max(down, 1) + 1  # rows of the original that a bicubic row depends on, plus one
    first = max(0, math.floor(top * down - reach))
    last = min(image.height, math.ceil((top + size) * down + reach))
    if (first, last) != (0, image.height):
        image = image.crop((0, first, image.width, last))
    columns = (left * across, 0, min((left + size) * across, image.width), last - first)
    image = image.resize((size, last - first), Image.Resampling.BICUBIC, columns)
    rows = (0, top * down - first, size, min((top + size) * down - first, last - first))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, rows))
