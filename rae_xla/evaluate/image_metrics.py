"""PSNR and SSIM between pairs of images, from their 8-bit pixels.

They are computed on the host: integer sums are exact there, and SSIM subtracts nearly equal
numbers, which the reduced precision of an accelerator's convolutions (TF32, bfloat16) would spoil.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rae_xla.sample.images import Pixels

Values = NDArray[np.float64]
"""(B,): one value per image."""

# Lower bound of the mean squared error: equal images have 100 dB, as in the reference code.
MSE_FLOOR = 1e-10


def psnr(first: Pixels, second: Pixels) -> Values:
    """Return the peak signal-to-noise ratio (B,) in dB of images (B, ...); 100 for equal images."""
    difference = first.astype(np.int64) - second.astype(np.int64)
    axes = tuple(range(1, difference.ndim))
    squares = np.square(difference).sum(axis=axes)
    mean = squares / (np.prod(difference.shape[1:]) * 255.0**2)
    return -10 * np.log10(np.maximum(mean, MSE_FLOOR))


def ssim(first: Pixels, second: Pixels) -> Values:
    """Return the structural similarity (B,) of images (B, 3, H, W) (Wang et al. 2004).

    This is torchmetrics' SSIM with its Gaussian window (11 x 11, sigma 1.5). Images are computed
    one by one, so that no value depends on the other images of the batch.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    def unit(image: Pixels) -> torch.Tensor:
        return torch.from_numpy(image[None]).float() / 255

    return np.array(
        [
            float(structural_similarity_index_measure(unit(a), unit(b), data_range=1.0))  # type: ignore[arg-type]
            for a, b in zip(first, second, strict=True)
        ]
    )
