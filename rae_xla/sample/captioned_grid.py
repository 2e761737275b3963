"""A sheet of pictures, each with its caption beneath it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rae_xla.sample.pictures import Pixels

MOST = 100
"""A sheet has no more pictures than this."""

_SMALLEST = 128  # pixels: a narrower picture is enlarged, or no caption would fit beneath it
_GAP = 6


def captioned_grid(pixels: Pixels, labels: Sequence[int], captions: Sequence[str]) -> Pixels:
    """Arrange pictures on white: a row for each class, or a square where classes do not repeat.

    Args:
        pixels: (N, H, W, 3) uint8.
        labels: N class numbers.
        captions: N texts; one that is too wide for its picture is cut short.

    Returns:
        (H', W', 3) uint8, of the first ``MOST`` pictures.
    """
    rows = _rows(list(labels[:MOST]))
    scale = math.ceil(_SMALLEST / pixels.shape[2])
    height, width = scale * pixels.shape[1], scale * pixels.shape[2]
    size = max(12, width // 16)
    font, strip = ImageFont.load_default(size), math.ceil(1.6 * size)
    down, across = height + strip + _GAP, width + _GAP
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * across + _GAP, len(rows) * down + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x, y = _GAP + j * across, _GAP + i * down
            tile = Image.fromarray(pixels[picture])
            sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
            text = _shortened(captions[picture], font, width)
            draw.text((x + width / 2, y + height + strip / 2), text, "black", font, anchor="mm")
    return np.asarray(sheet)


def _rows(labels: list[int]) -> list[list[int]]:
    """The numbers of the pictures in each row."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    if len(members) > 1 and max(map(len, members.values())) > 1:
        return list(members.values())
    columns = math.ceil(math.sqrt(len(labels)))
    return [list(range(i, min(i + columns, len(labels)))) for i in range(0, len(labels), columns)]


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
