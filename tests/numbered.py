"""Pictures that can be told apart, for the tests of data."""

from __future__ import annotations

import numpy as np


def numbered_arrays(count: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Pictures unlike their own mirror image, and labels 0 to 4."""
    images = np.random.default_rng(7).integers(0, 256, (count, size, size), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return images, np.arange(count) % 5
