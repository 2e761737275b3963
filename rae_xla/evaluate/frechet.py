"""The Fréchet distance between two sets of features, each seen as a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError

# Rows that enter the moments together. Fixed, and filled in the order of the images, so that the
# moments do not depend on how the rows came, not even by rounding.
BLOCK = 512

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean (D,) and sum of outer products of deviations (D, D), in float64.

    Two of them merge without cancellation (Chan, Golub and LeVeque 1983).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """The moments of rows (N, D), N > 0."""
        rows = features.double()
        mean = rows.mean(0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """The moments of both sets of rows together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        between = torch.outer(delta, delta) * (self.count * other.count / count)
        return FeatureMoments(
            count,
            self.mean + delta * (other.count / count),
            self.scatter + other.scatter + between,
        )

    def gaussian(self, what: str) -> Gaussian:
        """Mean and unbiased covariance (N - 1 in the denominator, as in every published FID).

        Raises:
            UserError: fewer than two rows, or values that are not finite; ``what`` names them.
        """
        if self.count < 2:
            raise UserError(
                f"{what}: {self.count} image has no covariance; the Fréchet distance needs two at "
                "least, and thousands to mean anything"
            )
        if not bool(torch.isfinite(self.scatter).all()):
            raise UserError(f"{what}: features that are not finite (NaN or infinite)")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


class MomentStream:
    """Moments of rows that come in parts, in order; nothing but the last block is kept."""

    def __init__(self) -> None:
        self._total: FeatureMoments | None = None
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Take the next rows (n, D), on the host."""
        self._waiting.append(features)
        if sum(map(len, self._waiting)) < BLOCK:
            return
        rows = torch.cat(self._waiting)
        whole = len(rows) // BLOCK * BLOCK
        for block in rows[:whole].split(BLOCK):
            self._total = self._with(block)
        self._waiting = [rows[whole:].clone()]

    def moments(self) -> FeatureMoments:
        """The moments of all rows so far; there must be one at least."""
        rest = torch.cat(self._waiting)
        total = self._with(rest) if len(rest) else self._total
        assert total is not None, "no rows were added"
        return total

    def _with(self, rows: Tensor) -> FeatureMoments:
        part = FeatureMoments.of(rows)
        return part if self._total is None else self._total.merge(part)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017).

    ``S1 S2`` has the eigenvalues of the symmetric ``S1^(1/2) S2 S1^(1/2)``, so two symmetric
    eigendecompositions do, which are stable where a square root of the product is not: with fewer
    samples than features both covariances are singular. Eigenvalues that rounding alone made are
    dropped, because the square root would magnify them: 1e-16 becomes 1e-8, thousands of times.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    largest = values.abs().max()
    kept = values > largest * len(values) * EPS  # the rule of matrix_rank
    root = vectors[:, kept] * values[kept].sqrt()
    product = root.T @ second.covariance @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2)
    # An eigenvalue here is a product of two: small ones that are real lie closer to rounding.
    floor = 10 * EPS * largest * torch.linalg.matrix_norm(second.covariance)
    overlap = shared[shared > floor].sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * overlap
    return max(0.0, distance.item())
