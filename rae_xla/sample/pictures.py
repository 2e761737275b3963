"""Pictures: from model outputs to bytes, grids and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Pixels = NDArray[np.uint8]


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [0, 1]."""
    return images.float() / 255


def to_pixels(images: Tensor, *, rounding: bool = False) -> Tensor:
    """Images (B, 3, H, W), clamped to [0, 1], as uint8 (B, H, W, 3).

    Fractions are cut off, as in the published sample sets; ``rounding`` takes the nearest instead,
    as in the published reconstructions.
    """
    scaled = images.float().clamp(0, 1) * 255 + (0.5 if rounding else 0.0)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    """Repeat the last row until the rows divide evenly among ``multiple`` devices."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def to_grid(pixels: Pixels, columns: int, gap: int = 2, captions: Sequence[str] = ()) -> Pixels:
    """Arrange pictures (N, H, W, 3) row by row on white; ``captions`` name the rows."""
    count, height, width, _ = pixels.shape
    rows = math.ceil(count / columns)
    margin = 8 * max((len(c) for c in captions), default=0)
    shape = (rows * (height + gap) + gap, margin + columns * (width + gap) + gap, 3)
    grid = np.full(shape, 255, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = gap + i // columns * (height + gap), margin + gap + i % columns * (width + gap)
        grid[y : y + height, x : x + width] = picture
    if not captions:
        return grid
    image = Image.fromarray(grid)
    draw = ImageDraw.Draw(image)
    for row, caption in enumerate(captions):
        draw.text((2, gap + row * (height + gap) + height // 2 - 6), caption, fill="black")
    return np.asarray(image)


def save_png(path: Path, pixels: Pixels) -> None:
    """Write one picture (H, W, 3); a file that is there is whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        Image.fromarray(pixels).save(unfinished, format="png")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
