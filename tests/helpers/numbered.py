"""Distinguishable images, for the tests of data."""

from __future__ import annotations

import numpy as np


def numbered_arrays(count: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return images that encode their number and differ from their mirror image, and labels 0 to 4.

    Pixel (0, 0) has the low and pixel (0, 1) the high byte of the number.
    """
    images = np.random.default_rng(7).integers(0, 256, (count, size, size), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return images, np.arange(count) % 5
