"""Cross-entropy of next tokens without storing the logits of a whole sequence.

The logits of a 512-token row over Qwen's vocabulary are 310 MB in float32. Here they exist for a
few positions at a time, and are computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rae_xla.models.text_to_image.slots import IGNORE

# Positions of a row whose logits exist at a time.
CHUNK = 128


def next_token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the next token, summed over the supervised tokens of each row.

    Args:
        hidden: final hidden states (B, L, D).
        weight: (V, D), the matrix of the logits.
        labels: (B, L); position i predicts label i + 1, ``IGNORE`` is not predicted.
        chunk: positions whose logits exist at a time.

    Returns:
        Sums of the losses (B,) float32, and numbers of tokens predicted correctly (B,) float32.
    """
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        # The same precision in both passes.
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
    result: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
    return result


def supervised_tokens(labels: Tensor) -> Tensor:
    """Return how many tokens of each row are predicted, (B,) float32."""
    return (labels[:, 1:] != IGNORE).float().sum(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        normalizers, losses, correct = [], [], []
        for part, target in zip(hidden.split(chunk, 1), targets.split(chunk, 1), strict=True):
            logits = (part @ weight.to(part.dtype).T).float()
            normalizer = logits.logsumexp(-1)
            known = target != IGNORE
            # A sum rather than a gather, which XLA would not fuse with its neighbours.
            chosen = torch.where(_one_hot(target, weight.shape[0]), logits, 0.0).sum(-1)
            losses.append(torch.where(known, normalizer - chosen, 0.0).sum(1))
            correct.append(((logits.argmax(-1) == target) & known).float().sum(1))
            normalizers.append(normalizer)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalizers, 1))
        ctx.chunk = chunk
        matches = torch.stack(correct).sum(0)
        ctx.mark_non_differentiable(matches)
        return torch.stack(losses).sum(0), matches

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        used = weight.to(hidden.dtype)
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        parts = (t.split(ctx.chunk, 1) for t in (hidden, targets, normalizers))
        for part, target, normalizer in zip(*parts, strict=True):
            probabilities = ((part @ used.T).float() - normalizer[..., None]).exp()
            error = probabilities - _one_hot(target, weight.shape[0]).float()
            error = torch.where((target != IGNORE)[..., None], error * grad[:, None, None], 0.0)
            error = error.to(hidden.dtype)
            grad_hidden.append(error @ used)
            grad_weight = grad_weight + torch.einsum("blv,bld->vd", error, part).float()
        return torch.cat(grad_hidden, 1), grad_weight.to(weight.dtype), None, None


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """Return (..., classes) bool, false everywhere for the target ``IGNORE``."""
    return torch.arange(classes, device=target.device) == target[..., None]
