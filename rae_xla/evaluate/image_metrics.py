"""How much two pictures differ, picture by picture, from their 8-bit pixels.

Computed on the host: sums of integers are exact there, and SSIM subtracts nearly equal numbers,
which the reduced precision of an accelerator's convolutions (TF32, bfloat16) would not survive.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rae_xla.sample.pictures import Pixels

Values = NDArray[np.float64]

# The smallest mean squared error that counts: equal pictures have 100 dB, as in the reference.
MSE_FLOOR = 1e-10


def psnr(first: Pixels, second: Pixels) -> Values:
    """Peak signal-to-noise ratio (B,) in dB of pictures (B, ...) uint8; 100 for equal ones."""
    difference = first.astype(np.int64) - second.astype(np.int64)
    axes = tuple(range(1, difference.ndim))
    squares = np.square(difference).sum(axis=axes)
    mean = squares / (np.prod(difference.shape[1:]) * 255.0**2)
    return -10 * np.log10(np.maximum(mean, MSE_FLOOR))


def ssim(first: Pixels, second: Pixels) -> Values:
    """Structural similarity (B,) of pictures (B, 3, H, W) uint8 (Wang et al. 2004).

    torchmetrics' with its Gaussian window (11 x 11, sigma 1.5), each picture by itself, so that
    no result depends on the pictures beside it.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    def unit(picture: Pixels) -> torch.Tensor:
        return torch.from_numpy(picture[None]).float() / 255

    return np.array(
        [
            float(structural_similarity_index_measure(unit(a), unit(b), data_range=1.0))  # type: ignore[arg-type]
            for a, b in zip(first, second, strict=True)
        ]
    )
