"""Latent statistics: exact mean and variance of an encoder's latents, per element."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.models.rae import RAE
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import to_unit
from rae_xla.sample.rows import in_flight


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of samples, in float64.

    Merging avoids cancellation (Chan, Golub and LeVeque 1983), so that batching changes the result
    by no more than rounding.
    """

    count: float
    mean: Tensor
    squares: Tensor

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the union of two sets of samples."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta**2 * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Tensor:
        """Population variance."""
        return self.squares / self.count


def latent_moments(rae: RAE, backend: Backend, batches: Iterable[Mapping[str, Tensor]]) -> Moments:
    """Encode every image once and return the moments of the latents, on every process.

    Args:
        rae: the autoencoder, placed, without latent statistics, so that its latents are raw.
        backend: where it is placed.
        batches: from ``one_pass``; rows of weight 0 are padding and are ignored.
    """
    rae.eval()

    @backend.compile
    def batch_moments(batch: Batch) -> tuple[Tensor, ...]:
        with torch.no_grad(), backend.autocast():
            latents = rae.encode(to_unit(batch["image"])).float()
        weight = batch["weight"].reshape(-1, *(1 for _ in latents.shape[1:]))
        count = batch["weight"].sum()
        # all rows of a process may be padding
        mean = (latents * weight).sum(0) / count.clamp(min=1)
        squares = ((latents - mean) ** 2 * weight).sum(0)
        return tuple(moment[None] for moment in (count, mean, squares))

    def start() -> Iterator[Callable[[], Batch]]:
        for host_batch in batches:
            batch = backend.shard_batch({name: host_batch[name] for name in ("image", "weight")})
            moments = dict(zip(("n", "mean", "squares"), batch_moments(batch), strict=True))
            # One row per graph: a backend's graph sees the rows of all processes, or only its own.
            yield backend.to_host_later(moments)

    total: Moments | None = None
    for host in in_flight(start()):
        for count, mean, squares in zip(host["n"], host["mean"], host["squares"], strict=True):
            part = Moments(count.item(), mean.double(), squares.double())
            total = part if total is None else total.merge(part)
    assert total is not None, "a data set has at least one batch"
    return total
