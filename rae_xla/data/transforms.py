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
    """Three channels of eight bits: grey is repeated, CMYK converted, transparency dropped."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255 instead of scaling them.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` the ADM way: halve with a box filter, then bicubic.

    Source: the evaluation preprocessing of Dhariwal and Nichol, "Diffusion models beat GANs"
    (2021), which published FID numbers on ImageNet rest on.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    return image.resize(target, Image.Resampling.BICUBIC)


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
    short, shorter_side = size * 3 // 2, min(image.size)
    target = (short * image.width // shorter_side, short * image.height // shorter_side)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left = math.floor(u[0] * (image.width - size + 1))
    top = math.floor(u[1] * (image.height - size + 1))
    return _cut(image, left, top, size)


def flip(pixels: Pixels) -> Pixels:
    """Left and right exchanged, of (H, W, C)."""
    return pixels[:, ::-1]


@dataclass(frozen=True)
class CenterCrop:
    """``center_crop`` as a transform for the stream; it makes no use of the uniforms."""

    size: int

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Pixels:
        """Bytes (size, size, 3)."""
        return center_crop(image, self.size)


@dataclass(frozen=True)
class ResizeRandomCrop:
    """``resize_random_crop`` as a transform for the stream."""

    size: int

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Pixels:
        """Bytes (size, size, 3)."""
        return resize_random_crop(image, self.size, u)


def make_transform(crop: Literal["center", "random"], size: int) -> Transform:
    """The transform that the setting ``data.crop`` names, at ``data.image_size``."""
    if size < 1:
        raise UserError(f"data.image_size is {size}; it must be at least 1")
    if crop == "center":
        return CenterCrop(size)
    if crop == "random":
        return ResizeRandomCrop(size)
    raise UserError(f"data.crop is {crop!r}; it must be 'center' or 'random'")


def _cut(image: Image.Image, left: int, top: int, size: int) -> Pixels:
    return np.asarray(image.crop((left, top, left + size, top + size)))
