"""Latents of the text-to-image model: statistics, maps, and the loss of regressed latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.models.pretrained.latent_statistics import standard_deviation

# Added to both vectors of the cosine of the auxiliary loss, as published.
_COSINE_EPS = 1e-8


class LatentStatistics(nn.Module):
    """Mean and standard deviation by which latent tokens are normalised for diffusion.

    The buffers are in the state dict, as in the published checkpoints that use statistics.

    Args:
        shape: (C,), or (P, C) for statistics of each position.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.data_mean: Tensor
        self.data_std: Tensor
        self.register_buffer("data_mean", torch.zeros(*shape))
        self.register_buffer("data_std", torch.ones(*shape))

    def set(self, mean: Tensor, var: Tensor) -> None:
        """Set the statistics from a mean and a variance, each of the module's shape."""
        self.data_mean.copy_(mean)
        self.data_std.copy_(standard_deviation(var))

    def normalize(self, tokens: Tensor) -> Tensor:
        """Normalise latent tokens (B, P, C)."""
        return (tokens - self.data_mean) / self.data_std

    def restore(self, tokens: Tensor) -> Tensor:
        """Undo ``normalize``."""
        return tokens * self.data_std + self.data_mean


def to_map(tokens: Tensor) -> Tensor:
    """Arrange row-major tokens (B, P, C) as a square map (B, C, side, side)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(latents: Tensor) -> Tensor:
    """Arrange a map (B, C, H, W) as row-major tokens (B, H·W, C)."""
    return latents.flatten(2).transpose(1, 2)


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the auxiliary loss of images (..., P, C): squared error plus 1 - cosine, (...)."""
    predicted, target = predicted.float(), target.float()
    squared = (predicted - target).square().mean(-1)
    first, second = (F.normalize(x + _COSINE_EPS, dim=-1) for x in (predicted, target))
    return (squared + 1 - (first * second).sum(-1)).mean(-1)
