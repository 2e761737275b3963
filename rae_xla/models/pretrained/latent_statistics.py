"""Latent statistics: the per-element mean and variance that normalise an RAE's latents.

Files store the variance (``var``), as published; a model holds ``std = sqrt(var + EPS)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.weights import read_weight_file

EPS = 1e-5  # added to the variance before the square root (Zheng et al. 2025, stage1/rae.py)
_MAX_ULP_STEPS = 32


def read_latent_statistics(path: str | Path) -> tuple[Tensor | None, Tensor]:
    """Read a statistics file.

    Args:
        path: a ``.pt`` or ``.safetensors`` file with ``var`` and, optionally, ``mean``.

    Returns:
        ``(mean, var)`` in float32; ``mean`` is None if the file has none.

    Raises:
        UserError: the file is missing, cannot be read, or has no usable ``var``.
    """
    values = read_weight_file(path, "normalization_stat_path")
    if not isinstance(values, Mapping) or not isinstance(values.get("var"), Tensor):
        raise UserError(
            f"normalization_stat_path: {path} has no `var` (a tensor with the variance of each "
            "latent element); `rae-xla stats` writes such a file"
        )
    mean, var = values.get("mean"), values["var"].float()
    if mean is not None and not isinstance(mean, Tensor):
        raise UserError(f"normalization_stat_path: `mean` in {path} is not a tensor")
    if not bool((var >= 0).all()):
        raise UserError(f"normalization_stat_path: `var` in {path} has negative or NaN values")
    return (None if mean is None else mean.float()), var


def standard_deviation(var: Tensor, eps: float = EPS) -> Tensor:
    """Return ``sqrt(var + eps)``, correctly rounded.

    torch's float32 square root is rounded differently on different processors, so the fingerprint
    of the result would depend on the machine.

    Args:
        var: float32 variance of each latent element.
        eps: added before the root.
    """
    return torch.sqrt((var + eps).double()).float()


def variance_from_std(std: Tensor) -> Tensor:
    """Return the float32 variance whose ``standard_deviation`` equals ``std`` bit for bit.

    ``std**2 - EPS`` alone is off by one unit in the last place for some elements.
    """
    target = std.float()
    return invert_exactly(standard_deviation, target.double().square().sub(EPS), target)


def invert_exactly(function: Callable[[Tensor], Tensor], initial: Tensor, target: Tensor) -> Tensor:
    """Find float32 values for which an increasing elementwise function equals ``target``.

    Args:
        function: elementwise and increasing.
        initial: values close to the solution.
        target: float32 values in the range of ``function``.

    Returns:
        ``initial``, moved by units in the last place until ``function`` gives ``target``.
    """
    values = initial.float()
    for _ in range(_MAX_ULP_STEPS):
        error = target - function(values)
        if not error.any():
            break
        direction = torch.where(error > 0, torch.inf, -torch.inf)
        values = torch.where(error == 0, values, torch.nextafter(values, direction))
    return values
