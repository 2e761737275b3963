"""Training loss of a network that predicts velocity, noise or score."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.transport.paths import Path, expand_like

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = ("velocity", "likelihood")


def prediction_loss(
    path: Path,
    prediction: str,
    loss_weight: str | None,
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """Return the mean squared error of each sample.

    Velocity prediction is not weighted. For noise and score prediction, the weight ``velocity``
    gives the loss of velocity prediction and ``likelihood`` that of the likelihood bound (SiT,
    table 3 and appendix). On the Linear and GVP paths the latter weight is negative, as published.

    Args:
        path: the probability path.
        prediction: what the network predicts, one of ``PREDICTIONS``.
        loss_weight: one of ``LOSS_WEIGHTS`` or None.
        output: the network's output at ``path.interpolate(data, noise, t)``, (B, ...).
        data: clean latents (B, ...).
        noise: standard normal noise (B, ...).
        t: shifted times (B,).

    Returns:
        (B,), in the dtype of the error.
    """
    tx = expand_like(t, data)
    if prediction == "velocity":
        error = (output - path.velocity(data, noise, tx)) ** 2
    else:
        sigma = path.sigma(tx)
        residual = output - noise if prediction == "noise" else output * sigma + noise
        error = _weight(path, loss_weight, tx, sigma) * residual**2
    return error.flatten(1).mean(1)


def _weight(path: Path, loss_weight: str | None, t: Tensor, sigma: Tensor) -> Tensor:
    if loss_weight == "velocity":
        return (path.drift_variance(t) / sigma) ** 2
    if loss_weight == "likelihood":
        return path.drift_variance(t) / sigma**2
    return torch.ones_like(t)
