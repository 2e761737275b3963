"""Fréchet distance between two sets of features, each modelled as a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError

BLOCK = 512
"""Rows that are added to the moments at a time.

It is constant and filled in the order of the images, so that the moments do not depend on batching,
not even by rounding.
"""

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean (D,) and sum of outer products of deviations (D, D), in float64.

    Merging avoids cancellation (Chan, Golub and LeVeque 1983).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Return the moments of rows (N, D), N > 0."""
        rows = features.double()
        mean = rows.mean(0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of the union of two sets of rows."""
        count = self.count + other.count
        delta = other.mean - self.mean
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        return FeatureMoments(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + between,
        )

    def gaussian(self, what: str) -> Gaussian:
        """Return mean and unbiased covariance (N - 1 in the denominator, as in published FIDs).

        Args:
            what: what the rows are, for error messages.

        Raises:
            UserError: if there are fewer than two rows, or values that are not finite.
        """
        if self.count < 2:
            raise UserError(
                f"{what}: {self.count} image has no covariance; a Fréchet distance needs at least "
                "two images, and thousands for a meaningful value"
            )
        if not bool(torch.isfinite(self.scatter).all()):
            raise UserError(
                f"{what}: some features are not finite; check the images and network weights"
            )
        return Gaussian(self.mean, self.scatter / (self.count - 1))


class MomentStream:
    """Computes the moments of rows that arrive in parts, in order; keeps less than a block."""

    def __init__(self) -> None:
        self._total: FeatureMoments | None = None
        self._pending: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Add the next rows (n, D), on the host."""
        self._pending.append(features)
        if sum(map(len, self._pending)) < BLOCK:
            return
        rows = torch.cat(self._pending)
        complete = len(rows) // BLOCK * BLOCK
        for block in rows[:complete].split(BLOCK):
            self._total = self._merged_with(block)
        self._pending = [rows[complete:].clone()]

    def moments(self) -> FeatureMoments:
        """Return the moments of all rows so far, at least one."""
        rest = torch.cat(self._pending)
        total = self._merged_with(rest) if len(rest) else self._total
        assert total is not None, "no rows were added"
        return total

    def _merged_with(self, rows: Tensor) -> FeatureMoments:
        part = FeatureMoments.of(rows)
        return part if self._total is None else self._total.merge(part)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017).

    ``S1 S2`` has the eigenvalues of the symmetric ``S1^(1/2) S2 S1^(1/2)``. Two symmetric
    eigendecompositions therefore suffice, and they stay stable with singular covariances (fewer
    samples than features), where a square root of the product does not. Eigenvalues that are due
    to rounding are dropped, because the square root would magnify them: thousands of values of
    1e-16 would each become 1e-8.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    largest = values.abs().max()
    kept = values > largest * len(values) * EPS  # the rule of matrix_rank
    root = vectors[:, kept] * values[kept].sqrt()
    product = root.T @ second.covariance @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2)
    # These eigenvalues are products of two, so that genuine small ones are closer to rounding.
    floor = 10 * EPS * largest * torch.linalg.matrix_norm(second.covariance)
    overlap = shared[shared > floor].sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * overlap
    return max(0.0, distance.item())
