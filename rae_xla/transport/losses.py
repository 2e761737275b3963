"""Training loss of a network that predicts velocity, noise, score or data."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.transport.paths import Path, expand_like

PREDICTIONS = ("velocity", "noise", "score", "x")
LOSS_WEIGHTS = ("velocity", "likelihood")


def prediction_loss(
    path: Path,
    prediction: str,
    loss_weight: str | None,
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    t_eps: float = 0.0,
) -> Tensor:
    """Return the mean squared error of each sample.

    Velocity prediction is not weighted, and data prediction (``x``) has the loss of the velocity
    that follows from it. For noise and score prediction, the weight ``velocity``
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
        t_eps: least time that velocities are computed with, on the Linear path; see
            :func:`velocity_from_data`. With 0, the target of velocity prediction is exact.

    Returns:
        (B,), in the dtype of the error.
    """
    tx = expand_like(t, data)
    if prediction == "x" or (prediction == "velocity" and t_eps > 0):
        x = path.interpolate(data, noise, tx)
        target = velocity_from_data(data, x, tx, t_eps)
        if prediction == "x":
            output = velocity_from_data(output, x, tx, t_eps)
        error = (output - target) ** 2
    elif prediction == "velocity":
        error = (output - path.velocity(data, noise, tx)) ** 2
    else:
        sigma = path.sigma(tx)
        residual = output - noise if prediction == "noise" else output * sigma + noise
        error = _weight(path, loss_weight, tx, sigma) * residual**2
    return error.flatten(1).mean(1)


def velocity_from_data(data: Tensor, x: Tensor, t: Tensor, t_eps: float) -> Tensor:
    """Return the velocity of the Linear path at ``x``, given the expected data.

    Args:
        data: (B, ...).
        x: noisy latents, of the same shape.
        t: times, in a shape that broadcasts to ``x``.
        t_eps: the difference is divided by t, but at least by this.
    """
    return (x - data) / t.clamp(min=t_eps)


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return the mean squared error (B,) between projected tokens and those of an encoder (REPA).

    RAEv2 uses this error in place of the cosine similarity of Yu et al. 2025.

    Args:
        projected: (B, N, C).
        features: (B, N, C), of a frozen encoder.
    """
    return (projected.float() - features.float()).square().flatten(1).mean(1)


def _weight(path: Path, loss_weight: str | None, t: Tensor, sigma: Tensor) -> Tensor:
    if loss_weight == "velocity":
        return (path.drift_variance(t) / sigma) ** 2
    if loss_weight == "likelihood":
        return path.drift_variance(t) / sigma**2
    return torch.ones_like(t)
