"""Times: the time shift, the training distribution and the sampling grid."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Shift times towards noise: ``shift * t / (1 + (shift - 1) * t)``, which preserves 0 and 1.

    Larger latents require more noise to destroy the same information, so ``shift`` grows with the
    square root of their size (Esser et al., 2024, section 5.3.2; RAE uses
    ``sqrt(C * H * W / 4096)``).
    """
    # In the published code, rounding turns 1 into 1.0000001 for some shifts, such as sqrt(24): a
    # step that starts there lies outside of guidance up to 1. All other times are as published, to
    # the bit: multistep solvers amplify a difference in the last digit by four orders of magnitude.
    shifted = shift * t / (1 + (shift - 1) * t)
    return torch.where(t < 1, shifted.clamp(max=1), t)


def time_grid(interval: tuple[float, float], num_steps: int, shift: float) -> Tensor:
    """Return decreasing times from noise towards data, evenly spaced and then shifted.

    Args:
        interval: (start, end) of ``1 - t``, unshifted.
        num_steps: number of grid points.
        shift: the time shift.

    Returns:
        (num_steps,) float32 on the CPU.
    """
    return shift_time(1 - torch.linspace(*interval, num_steps), shift)


@dataclass(frozen=True)
class TimeDistribution:
    """Distribution of the unshifted training times.

    Attributes:
        logit_normal: mean and standard deviation of ``logit(t)``, or None for the uniform
            distribution. The distribution is truncated to the training interval rather than
            clamped, so that no probability mass accumulates at its ends. In the interval (0, 1) it
            is not truncated.
    """

    logit_normal: tuple[float, float] | None = None

    def sample(self, u: Tensor, interval: tuple[float, float]) -> Tensor:
        """Transform uniform random numbers ``u`` in [0, 1) to times in ``interval``.

        Uses the inverse of the cumulative distribution function.
        """
        low, high = interval
        if self.logit_normal is None:
            return u * (high - low) + low
        mean, std = self.logit_normal
        p_low, p_high = (_normal_cdf((_logit(t) - mean) / std) for t in interval)
        p = p_low + (p_high - p_low) * u
        z = math.sqrt(2) * torch.erfinv(2 * p - 1)
        return torch.sigmoid(mean + std * z).clamp(low, high)


def parse_time_distribution(name: str) -> TimeDistribution:
    """Parse ``uniform`` or ``logit-normal_<mean>_<std>``.

    Raises:
        UserError: if the name is neither, or the standard deviation is not positive.
    """
    if name == "uniform":
        return TimeDistribution()
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    match = re.fullmatch(f"logit-normal_{number}_{number}", str(name))
    if match is None or float(match[2]) <= 0:
        raise UserError(
            f"time_dist_type: {name!r} is not a time distribution; choose 'uniform' or "
            "'logit-normal_<mean>_<std>' with std > 0, such as 'logit-normal_0_1'"
        )
    return TimeDistribution((float(match[1]), float(match[2])))


def _logit(p: float) -> float:
    if p in (0, 1):
        return -math.inf if p == 0 else math.inf
    return math.log(p / (1 - p))


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
