"""DiffAugment: differentiable augmentation of a discriminator's inputs (Zhao et al. 2020).

All randomness is passed in as uniform random numbers and all shapes depend on the image size only.
So one compiled program serves every step, and it contains no gather or scatter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Largest translation as a fraction of the side (Zhao et al. 2020, section 4).
TRANSLATION = 0.125
# Below this probability images are not augmented, as published.
MIN_PROB = 1e-6
NUM_FLAGS, NUM_DRAWS = 3, 7  # random numbers per batch and per image


def diff_augment(
    images: Tensor, flags: Tensor, draws: Tensor, *, prob: float, cutout: float
) -> Tensor:
    """Apply random translation, colour changes and cutout.

    Each of the three is applied to all images of the batch or to none, with parameters that differ
    between images.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        flags: (3,) uniform random numbers in [0, 1). Translation, colour and cutout are applied if
            their number is at most ``|prob|``.
        draws: (B, 7) uniform random numbers in [0, 1) per image: translation (rows, columns),
            brightness, saturation, contrast, centre of the cutout (row, column).
        prob: probability of each augmentation. The absolute value is used; a negative ``prob``
            disables cutout. Below 1e-6 in absolute value, the images are returned unchanged.
        cutout: side of the cutout as a fraction of the image's side; 0 for none.

    Returns:
        (B, 3, H, W) float32, with 0 in the cutout.
    """
    images = images.float()
    probability, use_cutout = abs(prob), prob > 0 and cutout > 0
    if probability < MIN_PROB:
        return images
    draw = draws.float().view(-1, NUM_DRAWS, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
    steps = [lambda x: _translate(x, draw[0], draw[1]), lambda x: _change_colour(x, *draw[2:5])]
    if use_cutout:
        steps.append(lambda x: _cutout(x, draw[5], draw[6], cutout))
    for flag, step in zip(flags, steps, strict=False):  # without cutout its flag is unused
        augmented = step(images)
        # With probability 1 no selection is needed, which halves the memory traffic of the step.
        applied = probability >= 1
        images = augmented if applied else torch.where(flag <= probability, augmented, images)
    return images


def _translate(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Shift each image by up to 1/8 of its sides, uniformly; fill with zeros."""
    return _shift(_shift(x, row, dim=-2), column, dim=-1)


def _shift(x: Tensor, draw: Tensor, dim: int) -> Tensor:
    """Shift by floor(draw * (2 reach + 1)) - reach pixels towards the start of ``dim``.

    A barrel shifter: each bit of the shift selects between two static slices. The result and its
    gradient are exact and, unlike indexing per image, it can be partitioned over devices.
    """
    size = x.shape[dim]
    reach = round(size * TRANSLATION)
    bits = (2 * reach).bit_length()
    # The offset in the padded image. The product may round up to 2 reach + 1, hence the clamp.
    shift = (draw * (2 * reach + 1)).floor().clamp(max=2 * reach).int()
    # Slicing shortens the image by the value of each bit, 2^bits - 1 in all.
    before, after = reach, 2**bits - 1 - reach
    x = F.pad(x, (0, 0, before, after) if dim == -2 else (before, after))
    for bit in reversed(range(bits)):  # largest first, so that the remaining slices are small
        step = 2**bit
        length = x.shape[dim] - step
        shifted, unshifted = x.narrow(dim, step, length), x.narrow(dim, 0, length)
        x = torch.where((shift & step) != 0, shifted, unshifted)
    return x


def _change_colour(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add ±0.5 to the brightness, then scale saturation by 0 to 2 and contrast by 0.5 to 1.5."""
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _cutout(x: Tensor, row: Tensor, column: Tensor, fraction: float) -> Tensor:
    """Set a rectangle with ``fraction`` of the sides, clipped at the border, to 0."""
    height, width = x.shape[-2:]
    rows = _inside(row, height, round(height * fraction), x.device).view(-1, 1, height, 1)
    columns = _inside(column, width, round(width * fraction), x.device).view(-1, 1, 1, width)
    return torch.where(rows & columns, 0.0, x)


def _inside(draw: Tensor, size: int, length: int, device: torch.device) -> Tensor:
    """Return a mask (B, 1, 1, size) of ``length`` pixels around the centre given by ``draw``."""
    # A cutout of even length has one more centre, so that it reaches both borders equally.
    centres = size + 1 - length % 2
    first = (draw * centres).floor().clamp(max=centres - 1) - math.floor(length / 2)
    pixel = torch.arange(size, device=device, dtype=torch.float32)
    return (pixel >= first) & (pixel < first + length)
