"""Cross-entropy of next tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.ops.cross_entropy import CHUNK, IGNORE, cross_entropy


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
    return cross_entropy(hidden, weight, targets, chunk)


def supervised_tokens(labels: Tensor) -> Tensor:
    """Return how many tokens of each row are predicted, (B,) float32."""
    return (labels[:, 1:] != IGNORE).float().sum(1)
