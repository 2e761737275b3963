"""Images: conversion between model outputs and pixels, grids, and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rae_xla import storage

Pixels = NDArray[np.uint8]
"""8-bit pixels; channels last, (..., H, W, 3), unless a docstring gives another shape."""

MAX_CAPTIONED_IMAGES = 100
"""The most images that ``captioned_grid`` shows."""

_MIN_CAPTIONED_WIDTH = 128  # pixels; narrower images are enlarged, to fit the caption
_CAPTIONED_GAP = 6  # pixels between the cells of a captioned grid


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [0, 1]."""
    return images.float() / 255


def to_pixels(images: Tensor, *, rounding: bool = False) -> Tensor:
    """Convert float images to uint8 pixels.

    Args:
        images: (B, 3, H, W), clamped to [0, 1].
        rounding: round to the nearest level, as the published reconstructions do; the default
            truncates, as the published sample sets do.

    Returns:
        (B, H, W, 3) uint8.
    """
    scaled = images.float().clamp(0, 1) * 255 + (0.5 if rounding else 0.0)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


def to_grid(pixels: Pixels, columns: int, gap: int = 2, captions: Sequence[str] = ()) -> Pixels:
    """Arrange images row by row on a white background.

    Args:
        pixels: (N, H, W, 3).
        columns: images per row.
        gap: pixels between images.
        captions: one text per row, drawn to the left of it; empty for no captions.

    Returns:
        (H', W', 3) uint8.
    """
    count, height, width, _ = pixels.shape
    rows = math.ceil(count / columns)
    margin = 8 * max((len(c) for c in captions), default=0)
    shape = (rows * (height + gap) + gap, margin + columns * (width + gap) + gap, 3)
    grid = np.full(shape, 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = gap + i // columns * (height + gap), margin + gap + i % columns * (width + gap)
        grid[y : y + height, x : x + width] = image
    if not captions:
        return grid
    canvas = Image.fromarray(grid)
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        draw.text((2, gap + row * (height + gap) + height // 2 - 6), caption, fill="black")
    return np.asarray(canvas)


def captioned_grid(pixels: Pixels, labels: Sequence[int], captions: Sequence[str]) -> Pixels:
    """Arrange images on a white background, each with a caption below it.

    Each class gets a row. If no class repeats, or there is only one, the grid is square.

    Args:
        pixels: (N, H, W, 3); only the first ``MAX_CAPTIONED_IMAGES`` are shown.
        labels: N class labels.
        captions: N texts; a text that is wider than its image is shortened.

    Returns:
        (H', W', 3) uint8.
    """
    rows = _caption_rows(list(labels[:MAX_CAPTIONED_IMAGES]))
    scale = math.ceil(_MIN_CAPTIONED_WIDTH / pixels.shape[2])
    height, width = scale * pixels.shape[1], scale * pixels.shape[2]
    font_size = max(12, width // 16)
    font, text_height = ImageFont.load_default(font_size), math.ceil(1.6 * font_size)
    cell_height, cell_width = height + text_height + _CAPTIONED_GAP, width + _CAPTIONED_GAP
    columns = max(map(len, rows))
    size = (columns * cell_width + _CAPTIONED_GAP, len(rows) * cell_height + _CAPTIONED_GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        for j, index in enumerate(row):
            x, y = _CAPTIONED_GAP + j * cell_width, _CAPTIONED_GAP + i * cell_height
            tile = Image.fromarray(pixels[index])
            canvas.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
            text = _shorten(captions[index], font, width)
            center = (x + width / 2, y + height + text_height / 2)
            draw.text(center, text, "black", font, anchor="mm")
    return np.asarray(canvas)


def _caption_rows(labels: list[int]) -> list[list[int]]:
    """Return the image indices of each row."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    if len(members) > 1 and max(map(len, members.values())) > 1:
        return list(members.values())
    columns = math.ceil(math.sqrt(len(labels)))
    return [list(range(i, min(i + columns, len(labels)))) for i in range(0, len(labels), columns)]


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut ``text`` to ``width`` pixels and mark the cut with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def save_png(path: str | Path, pixels: Pixels) -> None:
    """Write one image (H, W, 3) atomically: ``path`` never holds part of a file."""
    if storage.is_remote(str(path)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="png")
        storage.write_bytes(str(path), buffer.getvalue())
        return
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        Image.fromarray(pixels).save(unfinished, format="png")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
