"""Orthogonalisation of matrices by a Newton-Schulz iteration (Muon, Jordan et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

# "The Polar Express" (Amsel et al. 2025) for five steps. Coefficients of x, x³ and x⁵ are divided
# by powers of a safety factor, without which rounding could make the iteration diverge.
_SAFETY = 1.05
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
PRESETS: dict[str, tuple[Coefficients, ...]] = {
    "polar_express": tuple(
        (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS
    ),
    # Coefficients of You (2025), as in Dao-AILab/gram-newton-schulz.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Coefficients of the steps by name."""

_EPS = 1e-7  # added to the norm, as published


def orthogonalise(
    matrices: Tensor, coefficients: Sequence[Coefficients], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Map the singular values of matrices to approximately 1.

    Args:
        matrices: (n, rows, columns) with at most as many rows as columns, which is cheaper.
        coefficients: of the steps, an element of ``PRESETS``.
        dtype: of the products; norms are computed in float32.

    Returns:
        (n, rows, columns) float32. A matrix of zeros stays zero.
    """
    x = matrices.float()
    norm = x.square().sum((1, 2), keepdim=True).sqrt()
    x = (x / (norm + _EPS)).to(dtype)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.transpose(1, 2))
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    return x.float()
