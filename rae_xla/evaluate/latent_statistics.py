"""Exact mean and variance of an encoder's latents, element by element."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.models.rae import RAE
from rae_xla.runtime import Batch, Runtime
from rae_xla.sample.pictures import to_unit


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of samples, in float64.

    Two of them merge without cancellation (Chan, Golub and LeVeque 1983), so the result does not
    depend on how the samples were batched by more than rounding.
    """

    count: float
    mean: Tensor
    squares: Tensor

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of samples together."""
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


def latent_moments(rae: RAE, runtime: Runtime, batches: Iterable[Mapping[str, Tensor]]) -> Moments:
    """Encode every image once and gather the moments of its latents.

    Args:
        rae: placed, without latent statistics of its own, so that raw latents are measured.
        runtime: where it is. Its compiled functions see the rows of all processes, or their own
            alone: of either, every process gets all the moments there are.
        batches: from ``one_pass``; rows of weight 0 do not count.
    """
    rae.eval()

    @runtime.compile
    def batch_moments(batch: Batch) -> tuple[Tensor, ...]:
        with torch.no_grad(), runtime.autocast():
            latents = rae.encode(to_unit(batch["image"])).float()
        weight = batch["weight"].reshape(-1, *(1 for _ in latents.shape[1:]))
        count = batch["weight"].sum()
        # rows that only fill up a batch may be all that a process has
        mean = (latents * weight).sum(0) / count.clamp(min=1)
        squares = ((latents - mean) ** 2 * weight).sum(0)
        return tuple(moment[None] for moment in (count, mean, squares))

    total: Moments | None = None
    wanted = ("image", "weight")
    for host_batch in batches:
        batch = runtime.put({name: host_batch[name] for name in wanted})
        host = runtime.to_host(
            dict(zip(("n", "mean", "squares"), batch_moments(batch), strict=True))
        )
        for count, mean, squares in zip(host["n"], host["mean"], host["squares"], strict=True):
            part = Moments(count.item(), mean.double(), squares.double())
            total = part if total is None else total.merge(part)
    assert total is not None, "a data set has at least one batch"
    return total
