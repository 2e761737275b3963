"""DiffAugment: random changes of what a discriminator sees, differentiable (Zhao et al. 2020).

All randomness comes in as uniform draws and all shapes are fixed by the image size, so one
compiled program serves every draw, with no gather or scatter in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Largest translation as a share of the side (Zhao et al. 2020, section 4).
TRANSLATION = 0.125
# Below this probability nothing is done.
MIN_PROB = 1e-6
NUM_FLAGS, NUM_DRAWS = 3, 7


def diff_augment(
    images: Tensor, flags: Tensor, draws: Tensor, *, prob: float, cutout: float
) -> Tensor:
    """Translate, recolour and cut a hole into each image.

    Whether a change is made is decided once for the batch, how for each image.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        flags: (3,) uniform draws in [0, 1): translation, colour and cutout are done where the
            draw is at most ``|prob|``.
        draws: (B, 7) uniform draws in [0, 1) per image: translation (rows, columns), brightness,
            saturation, contrast, centre of the hole (row, column).
        prob: probability of each change; its absolute value counts, and a negative one leaves
            cutout off. Below 1e-6 the images are returned as they are.
        cutout: side of the hole as a share of the image's side; 0 for none.

    Returns:
        (B, 3, H, W) float32; a hole is 0.
    """
    images = images.float()
    share, holes = abs(prob), prob > 0 and cutout > 0
    if share < MIN_PROB:
        return images
    draw = draws.float().view(-1, NUM_DRAWS, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
    steps = [lambda x: _translate(x, draw[0], draw[1]), lambda x: _recolour(x, *draw[2:5])]
    if holes:
        steps.append(lambda x: _cut_hole(x, draw[5], draw[6], cutout))
    for flag, change in zip(flags, steps, strict=False):  # without a hole its flag is not read
        changed = change(images)
        # Certain changes are not selected among: half the memory traffic of each.
        images = changed if share >= 1 else torch.where(flag <= share, changed, images)
    return images


def _translate(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Move each image by up to 1/8 of its sides, each shift as likely; zeros come in."""
    return _shift(_shift(x, row, dim=-2), column, dim=-1)


def _shift(x: Tensor, draw: Tensor, dim: int) -> Tensor:
    """Move by floor(draw * (2 reach + 1)) - reach pixels towards the start of ``dim``.

    A barrel shifter: the shift is taken bit by bit, each a choice between two static slices. That
    is exact, has an exact gradient, and unlike an index per image it partitions over devices.
    """
    size = x.shape[dim]
    reach = round(size * TRANSLATION)
    bits = (2 * reach).bit_length()
    # From the start of the padded image; the draw's product may round up to 2 reach + 1.
    shift = (draw * (2 * reach + 1)).floor().clamp(max=2 * reach).int()
    # Each bit's slices are shorter by its value, all bits together by 2^bits - 1.
    before, after = reach, 2**bits - 1 - reach
    x = F.pad(x, (0, 0, before, after) if dim == -2 else (before, after))
    for bit in reversed(range(bits)):  # the largest first, for the rest to be small
        step = 2**bit
        length = x.shape[dim] - step
        moved, still = x.narrow(dim, step, length), x.narrow(dim, 0, length)
        x = torch.where((shift & step) != 0, moved, still)
    return x


def _recolour(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness by ±0.5, saturation by 0 to 2, contrast by 0.5 to 1.5, in this order."""
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _cut_hole(x: Tensor, row: Tensor, column: Tensor, share: float) -> Tensor:
    """Set a rectangle of ``share`` of the sides to 0; at the border it is cut short."""
    height, width = x.shape[-2:]
    rows = _inside(row, height, round(height * share), x.device).view(-1, 1, height, 1)
    columns = _inside(column, width, round(width * share), x.device).view(-1, 1, 1, width)
    return torch.where(rows & columns, 0.0, x)


def _inside(draw: Tensor, size: int, hole: int, device: torch.device) -> Tensor:
    """Which of ``size`` pixels lie in a hole centred by ``draw``: (B, 1, 1, size)."""
    # An even hole has one more centre, for its edge to reach both borders alike.
    centres = size + 1 - hole % 2
    first = (draw * centres).floor().clamp(max=centres - 1) - math.floor(hole / 2)
    pixel = torch.arange(size, device=device, dtype=torch.float32)
    return (pixel >= first) & (pixel < first + hole)
