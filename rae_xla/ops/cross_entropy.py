"""Cross-entropy over a large vocabulary, without storing all logits; dispatched on the device.

The logits of a 512-token row over Qwen's vocabulary are 310 MB in float32. Here they exist for a
few positions at a time, and are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rae_xla.ops import dispatch

IGNORE = -100
"""Target of positions that are not predicted, as in PyTorch."""

CHUNK = 128
"""Positions of a row whose logits exist at a time."""


class RowLosses(NamedTuple):
    """Losses of rows.

    Attributes:
        sums: of the losses of each row's targets, (B,) float32.
        matches: how many targets of each row have the largest logit, (B,) float32.
        normalizers: log-sum-exp of the logits of each position, (B, L) float32.
    """

    sums: Tensor
    matches: Tensor
    normalizers: Tensor


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the logits ``hidden @ weight.T``, summed over each row.

    Args:
        hidden: (B, L, D); the products are computed in its dtype.
        weight: (V, D).
        targets: (B, L), ``IGNORE`` where nothing is predicted.
        chunk: positions whose logits exist at a time.

    Returns:
        Sums of the losses (B,) float32, and numbers of targets with the largest logit (B,) float32.
    """
    result: tuple[Tensor, Tensor] | None = dispatch.call(
        "cross_entropy", hidden.device.type, hidden, weight, targets, chunk
    )
    if result is None:
        result = _CrossEntropy.apply(hidden, weight, targets, chunk)
    return result


def row_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> RowLosses:
    """Compute the forward pass; the arguments are those of ``cross_entropy``, of one dtype."""
    normalizers, losses, matches = [], [], []
    for part, target in _chunks(chunk, hidden, targets):
        logits = (part @ weight.T).float()
        normalizer = logits.logsumexp(-1)
        known = target != IGNORE
        # A sum rather than a gather, which XLA would not fuse with its neighbours.
        chosen = torch.where(_one_hot(target, weight.shape[0]), logits, 0.0).sum(-1)
        losses.append(torch.where(known, normalizer - chosen, 0.0).sum(1))
        matches.append(((logits.argmax(-1) == target) & known).float().sum(1))
        normalizers.append(normalizer)
    return RowLosses(
        torch.stack(losses).sum(0), torch.stack(matches).sum(0), torch.cat(normalizers, 1)
    )


def row_gradients(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Compute the backward pass.

    Args:
        gradient: of the sums, (B,).
        hidden, weight, targets, chunk: those of the forward pass.
        normalizers: result of the forward pass.

    Returns:
        Gradients of ``hidden``, in its dtype, and of ``weight``, (V, D) float32.
    """
    hidden_gradients, weight_gradient = [], torch.zeros_like(weight, dtype=torch.float32)
    for part, target, normalizer in _chunks(chunk, hidden, targets, normalizers):
        probabilities = ((part @ weight.T).float() - normalizer[..., None]).exp()
        error = probabilities - _one_hot(target, weight.shape[0]).float()
        error = torch.where((target != IGNORE)[..., None], error * gradient[:, None, None], 0.0)
        error = error.to(hidden.dtype)
        hidden_gradients.append(error @ weight)
        weight_gradient = weight_gradient + torch.einsum("blv,bld->vd", error, part).float()
    return torch.cat(hidden_gradients, 1), weight_gradient


def _chunks(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(chunk, 1) for tensor in tensors), strict=True)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """Return (..., classes) bool, false everywhere for the target ``IGNORE``."""
    return torch.arange(classes, device=target.device) == target[..., None]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        sums, matches, normalizers = row_losses(hidden, weight.to(hidden.dtype), targets, chunk)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(matches)
        return sums, matches

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        used = weight.to(hidden.dtype)
        of_hidden, of_weight = row_gradients(
            gradient, hidden, used, targets, normalizers, ctx.chunk
        )
        return of_hidden, of_weight.to(weight.dtype), None, None
