"""Flow matching of text-to-image models: times shifted by the size of the latents.

Differs from the transport of RAE (``create_transport``) in three ways: the training times are not
truncated, the shift may be below 1, and the sampler ends at data (t = 0) instead of just before it.
Scale-RAE predicts the velocity, RAEv2 the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport.create import DATA_T_EPS
from rae_xla.transport.paths import PATHS
from rae_xla.transport.steps import require_steps
from rae_xla.transport.times import TimeDistribution, shift_time
from rae_xla.transport.transport import Transport

# The published sampler has a table of 1000 unshifted times, 1/1000 to 1, of which it uses some.
_TABLE_SIZE = 1000


class SizedFlow(Transport):
    """Velocity or data prediction on the linear path with logit-normal times and a time shift.

    Args:
        shift: the time shift, see :func:`size_shift`.
        prediction: ``velocity`` or ``x``, the data.
        t_eps: for ``x``: least time that velocities are computed with.

    Raises:
        UserError: the shift is not a positive number, or the prediction is another one.
    """

    def __init__(
        self, shift: float, prediction: str = "velocity", t_eps: float = DATA_T_EPS
    ) -> None:
        if prediction not in ("velocity", "x"):
            raise UserError(
                f"transport.params.prediction is {prediction}: text-to-image models predict "
                "velocity or x"
            )
        if not (math.isfinite(shift) and shift > 0):
            raise UserError(f"the time shift must be positive, got {shift!r}")
        super().__init__(
            path=PATHS["Linear"],
            prediction=prediction,
            loss_weight=None,
            train_eps=0.0,
            sample_eps=0.0,
            time_distribution=TimeDistribution((0.0, 1.0)),
            time_dist_shift=shift,
            t_eps=t_eps if prediction == "x" else 0.0,
        )

    def times_from_normal(self, normal: Tensor) -> Tensor:
        """Transform standard normal random numbers (B,) to shifted training times in (0, 1)."""
        return shift_time(torch.sigmoid(normal.float()), self.time_dist_shift)

    def sample_times(self, u: Tensor) -> Tensor:
        """Transform uniform random numbers (B,) in [0, 1) to shifted training times in (0, 1)."""
        # Half a step of a 24-bit uniform number away from 0 and 1, whose logits are infinite.
        inner = u.float() * (1 - 2.0**-23) + 2.0**-24
        return self.times_from_normal(math.sqrt(2) * torch.erfinv(2 * inner - 1))

    def time_grid(self, num_steps: int, end: float | None = None) -> Tensor:
        """Return the times of an ODE sampler: (num_steps,), decreasing from 1 to 0, float32.

        For velocity prediction they are the ``num_steps - 1`` times of the published table, then
        0; for data prediction, and with ``end``, those of :meth:`Transport.time_grid`.
        """
        if end is not None:
            return super().time_grid(num_steps, end)
        require_steps(num_steps, minimum=2)
        if self.prediction == "x":
            return super().time_grid(num_steps - 1, end=0.0)
        times = table_times(num_steps - 1)
        shifted = shift_time(torch.tensor(times, dtype=torch.float64), self.time_dist_shift)
        return torch.cat([shifted, shifted.new_zeros(1)]).float()


def size_shift(channels: int, tokens: int, base: float = 4096.0) -> float:
    """Return the time shift sqrt(channels * tokens / base) of a latent; it may be below 1."""
    return math.sqrt(channels * tokens / base)


def table_times(count: int) -> list[float]:
    """Return ``count`` unshifted times of the published table of 1000, decreasing from 1.

    A single time is 1. Python's ``round`` rounds halves to even, as the published sampler does.
    """
    if count == 1:
        return [1.0]
    stride = (_TABLE_SIZE - 1) / (count - 1)
    # Accumulated rather than multiplied, so that halves round as published.
    position, indices = 0.0, []
    for _ in range(count):
        indices.append(round(position))
        position += stride
    return [(index + 1) / _TABLE_SIZE for index in reversed(indices)]
