"""Image resizing by two matrix products, identical on every device.

XLA has no bicubic resize and would fall back to the host. Bicubic and bilinear resizing are linear
and separable, so ``rows @ image @ columns.T`` computes them exactly. Both matrices depend on the
sizes only, and a compiler folds them to constants.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rae_xla.ops.dispatch import requires_static_graph

# Free parameter of the cubic kernel (Keys 1981), as in torch.nn.functional.interpolate.
CUBIC_A = -0.75

# Fractional positions (n,) -> weights (n, taps) of the pixels around them.
Kernel = Callable[[Tensor], Tensor]


def resize_bicubic(images: Tensor, size: tuple[int, int] | int) -> Tensor:
    """Resize images bicubically, with repeated edges and without antialiasing.

    Equals ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``. Computed in
    float32, even under autocast.

    Args:
        images: (..., H, W).
        size: new (height, width), or one number for both.

    Returns:
        (..., *size), in the dtype of ``images``.
    """
    return _resize(images, size, _cubic_weights, first_tap=-1)


def resize_bilinear(images: Tensor, size: tuple[int, int] | int) -> Tensor:
    """Resize images bilinearly, without antialiasing.

    Equals ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``. Computed in
    float32, even under autocast.

    Args:
        images: (..., H, W).
        size: new (height, width), or one number for both.

    Returns:
        (..., *size), in the dtype of ``images``.
    """
    return _resize(images, size, _linear_weights, first_tap=0)


def resize_bicubic_antialiased(images: Tensor, size: int) -> Tensor:
    """Resize square images bicubically with antialiasing, in float32.

    Equals ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``. Where the graph is
    static, its two matrices are computed on the CPU and become constants.

    Args:
        images: (B, C, S, S).
        size: new side.

    Returns:
        (B, C, size, size), float32; values may lie outside of the range of ``images``.
    """
    images, source = images.float(), images.shape[-1]
    if source == size:
        return images
    if not requires_static_graph(images.device):
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    columns = torch.eye(source, device="cpu").view(1, 1, source, source)
    matrix = F.interpolate(columns, (size, source), mode="bicubic", antialias=True)[0, 0]
    matrix = matrix.to(images.device)
    with _full_precision(images.device.type):
        return matrix @ images @ matrix.T


def _cubic_weights(t: Tensor) -> Tensor:
    """Return the weights (n, 4) of the pixels at -1, 0, 1, 2 for positions ``t`` in [0, 1)."""

    def near(x: Tensor) -> Tensor:  # |x| <= 1
        return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:  # 1 < |x| < 2
        return CUBIC_A * (((x - 5) * x + 8) * x - 4)

    return torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], dim=-1)


def _linear_weights(t: Tensor) -> Tensor:
    """Return the weights (n, 2) of the pixels at 0, 1 for positions ``t`` in [0, 1)."""
    return torch.stack([1 - t, t], dim=-1)


def _matrix(
    source: int, target: int, kernel: Kernel, first_tap: int, device: torch.device
) -> Tensor:
    """Return the (target, source) matrix that resizes one axis from ``source`` to ``target``."""
    # In float64, with the roundings of PyTorch's kernel (a float32 scale, a fused multiply-add): at
    # 512 pixels one rounding more or less changes the result by 3e-5.
    scale = np.float32(source) / np.float32(target)
    index = torch.arange(target, dtype=torch.float64, device=_float64_device(device))
    position = (float(scale) * (index + 0.5) - 0.5).float().to(device)
    left = position.floor()
    taps = kernel(position - left)
    offsets = torch.arange(taps.shape[1], device=device, dtype=torch.float32) + first_tap
    pixels = (left[:, None] + offsets).clamp(0, source - 1)
    columns = torch.arange(source, device=device, dtype=torch.float32)
    return (taps[:, :, None] * (pixels[:, :, None] == columns)).sum(dim=1)


def _float64_device(device: torch.device) -> torch.device:
    """Return where to compute positions: on the device if it has float64, else on the CPU.

    A copy from the CPU would make the host wait for all work of the device, in every step. On XLA
    the matrix is part of the compiled graph, as a constant.
    """
    return device if device.type in ("cuda", "meta") else torch.device("cpu")


def _resize(images: Tensor, size: tuple[int, int] | int, kernel: Kernel, first_tap: int) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    source_height, source_width = images.shape[-2:]
    device = images.device
    with _full_precision(device.type):
        result = images.float()
        if source_height != height:
            result = _matrix(source_height, height, kernel, first_tap, device) @ result
        if source_width != width:
            result = result @ _matrix(source_width, width, kernel, first_tap, device).T
    return result.to(images.dtype)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast, which the meta device does not support."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
