"""Probability paths between data (t = 0) and noise (t = 1).

A path defines how data and noise are mixed at time ``t``,

    x_t = alpha(t) * data + sigma(t) * noise,

from which follow the velocity that a network learns and the conversions between velocity, score
and noise. The paths are those of SiT (Ma et al., 2024, section 2 and appendix), with time running
from data to noise.

All functions require ``t`` in a shape that broadcasts to ``x``; see :func:`expand_like`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TimeFunction = Callable[[Tensor], Tensor]

# The linear noise schedule of DDPM in continuous time (Song et al., 2021, appendix C).
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


@dataclass(frozen=True)
class Path:
    """A probability path, defined by functions of time.

    Attributes:
        name: published name.
        alpha: coefficient of the data.
        d_alpha: derivative of ``alpha``.
        sigma: coefficient of the noise.
        d_sigma: derivative of ``sigma``.
        drift_scale: coefficient of x in the probability-flow ODE,
            ``velocity = -drift_scale(t) * x + drift_variance(t) * score``.
        drift_variance: coefficient of the score in that ODE.
    """

    name: str
    alpha: TimeFunction
    d_alpha: TimeFunction
    sigma: TimeFunction
    d_sigma: TimeFunction
    drift_scale: TimeFunction
    drift_variance: TimeFunction

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``x_t``, the mixture of ``data`` and ``noise`` at time ``t``."""
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the derivative of ``x_t`` w.r.t. ``t``, the target of velocity prediction."""
        return self.d_alpha(t) * data + self.d_sigma(t) * noise

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at ``x``, given the score of the marginal distribution."""
        return self.drift_variance(t) * score - self.drift_scale(t) * x

    def score_from_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """Return the score, given the expected noise."""
        return -noise / self.sigma(t)

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the score at ``x``, given the velocity. Not finite at t = 0."""
        sigma, ratio = self.sigma(t), self.alpha(t) / self.d_alpha(t)
        return (ratio * velocity - x) / (sigma**2 - ratio * self.d_sigma(t) * sigma)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the expected noise in ``x``, given the velocity."""
        ratio = self.alpha(t) / self.d_alpha(t)
        return (ratio * velocity - x) / (ratio * self.d_sigma(t) - self.sigma(t))


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape ``t`` (B,) to (B, 1, ..., 1), which broadcasts to ``x`` (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim()))


def _linear() -> Path:
    return Path(
        name="Linear",
        alpha=lambda t: 1 - t,
        d_alpha=lambda t: -torch.ones_like(t),
        sigma=lambda t: t,
        d_sigma=torch.ones_like,
        drift_scale=lambda t: 1 / (1 - t),
        drift_variance=lambda t: -t / (1 - t),
    )


def _gvp() -> Path:
    """Return the trigonometric path, with alpha² + sigma² = 1 at all times."""
    quarter = math.pi / 2

    def drift_variance(t: Tensor) -> Tensor:
        sin, cos = torch.sin(quarter * t), torch.cos(quarter * t)
        return -quarter * (sin / cos * sin**2 + sin * cos)

    return Path(
        name="GVP",
        alpha=lambda t: torch.cos(quarter * t),
        d_alpha=lambda t: -quarter * torch.sin(quarter * t),
        sigma=lambda t: torch.sin(quarter * t),
        d_sigma=lambda t: quarter * torch.cos(quarter * t),
        drift_scale=lambda t: quarter * torch.tan(quarter * t),
        drift_variance=drift_variance,
    )


def _vp() -> Path:
    """Return the variance-preserving diffusion path, with time reversed.

    The drift coefficients have the sign of forward diffusion time, which is inconsistent with
    alpha and sigma. This is kept because published networks were sampled with it.
    """
    spread = VP_BETA_MAX - VP_BETA_MIN

    def log_sigma(t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * spread - 0.5 * (1 - t) * VP_BETA_MIN

    def d_log_sigma(t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * spread + 0.5 * VP_BETA_MIN

    def beta(t: Tensor) -> Tensor:
        return VP_BETA_MIN + (1 - t) * spread

    def alpha(t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * log_sigma(t)))

    def sigma(t: Tensor) -> Tensor:
        return torch.exp(log_sigma(t))

    return Path(
        name="VP",
        alpha=alpha,
        d_alpha=lambda t: -torch.exp(2 * log_sigma(t)) * d_log_sigma(t) / alpha(t),
        sigma=sigma,
        d_sigma=lambda t: sigma(t) * d_log_sigma(t),
        drift_scale=lambda t: -0.5 * beta(t),
        drift_variance=lambda t: 0.5 * beta(t),
    )


PATHS = {path.name: path for path in (_linear(), _gvp(), _vp())}
