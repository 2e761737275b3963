"""The images of a batch as one array, which is allocated when the first image gives its size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.data.transforms import Pixels, Transform


class ImageStack:
    """Collects images (H, W, 3) in an array, each while it is in the CPU cache.

    Args:
        count: number of rows.
        slots: images of a row.
    """

    def __init__(self, count: int, slots: int = 1) -> None:
        self._count, self._slots = count, slots
        self._array: NDArray[np.uint8] | None = None

    def put(self, row: int, slot: int, pixels: Pixels) -> None:
        """Set the image of a slot of a row."""
        if self._array is None:
            self._allocate(pixels)
        assert self._array is not None
        self._array[row, slot] = pixels.transpose(2, 0, 1)

    def complete(self, transform: Transform) -> NDArray[np.uint8]:
        """Return the images (count, 3, H, W), or (count, slots, 3, H, W) with several slots.

        Args:
            transform: gives the size of images if there is none.
        """
        if self._array is None:
            self._allocate(np.asarray(transform(Image.new("RGB", (8, 8)), (0.5, 0.5))))
        assert self._array is not None
        return self._array[:, 0] if self._slots == 1 else self._array

    def _allocate(self, pixels: Pixels) -> None:
        shape = (self._count, self._slots, 3, *pixels.shape[:2])
        self._array = np.zeros(shape, np.uint8)
