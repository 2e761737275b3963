"""Conversion to pixels, grids and padding."""

import numpy as np
import pytest
import torch
from PIL import Image

from rae_xla.sample.images import captioned_grid, save_png, to_grid, to_pixels, to_unit
from rae_xla.sample.rows import pad_rows


def test_pixels_are_truncated_or_rounded_after_clamping():
    images = torch.tensor([-0.1, 0.499, 0.999, 1.2]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_pixels(images)[0, ..., 0].flatten().tolist() == [0, 127, 254, 255]
    assert to_pixels(images, rounding=True)[0, ..., 0].flatten().tolist() == [0, 127, 255, 255]


def test_conversion_of_pixels_round_trips():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_pixels(to_unit(pixels), rounding=True), pixels.permute(0, 2, 3, 1))


def test_grid_places_images_row_by_row(tmp_path):
    pixels = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(5)])
    grid = to_grid(pixels, columns=3, gap=1)
    assert grid.shape == (11, 16, 3)
    assert [grid[1, 1, 0], grid[1, 6, 0], grid[6, 1, 0], grid[6, 6, 0]] == [0, 1, 3, 4]
    assert grid[6, 11, 0] == 255
    captioned = to_grid(pixels, columns=3, captions=["ab", "c"])
    assert captioned.shape[1] == grid.shape[1] + 4 + 16
    save_png(tmp_path / "grid.png", grid)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)


@pytest.mark.parametrize(
    ("labels", "columns", "rows"),
    [([1, 2, 1, 2, 1], 3, 2), ([1, 2, 3, 4, 5], 3, 2), ([1, 1, 1, 1], 2, 2), ([1], 1, 1)],
)
def test_captioned_grid_has_a_row_per_class_or_is_square(labels, columns, rows):
    pixels = np.zeros((len(labels), 256, 256, 3), np.uint8)
    grid = captioned_grid(pixels, labels, len(labels) * [40 * "long "])
    assert grid.shape == (rows * (256 + 26 + 6) + 6, columns * (256 + 6) + 6, 3)
    assert (grid[:, :6] == 255).all()  # no caption extends into the margin
    assert (grid[:, -6:] == 255).all()


def test_padding_repeats_the_last_row():
    assert pad_rows(torch.tensor([1, 2, 3]), 4).tolist() == [1, 2, 3, 3]
    assert pad_rows(torch.tensor([1, 2]), 2).tolist() == [1, 2]
