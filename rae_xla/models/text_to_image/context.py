"""Contexts: sequences of condition vectors that a head attends to, with their padding.

A context is one tensor (B, T, channels + 1), whose last channel is 1 for a token and 0 for padding.
So guidance, samplers and sharding handle it like any other condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae_xla.ops.attention import MASKED
from rae_xla.ops.normalization import RMSNorm


def pack_context(states: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return the context of condition vectors.

    Args:
        states: (B, T, channels).
        padding: (B, T) bool, true where there is no token; None: nowhere.
    """
    if padding is None:
        padding = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    states = torch.where(padding[..., None], 0.0, states)
    return torch.cat([states, (~padding)[..., None].to(states.dtype)], dim=-1)


def context_bias(context: Tensor, others: int = 0) -> Tensor:
    """Return the bias of the attention to ``others`` tokens and then to those of a context.

    Returns:
        (B, 1, 1, others + T) float32, see ``ops.attention``.
    """
    bias = torch.where(context[..., -1] > 0.5, 0.0, MASKED).float()
    return nn.functional.pad(bias, (others, 0))[:, None, None]


class ContextEmbedder(nn.Module):
    """Normalises and projects the vectors of a context, as published by RAEv2.

    Args:
        context_dim: channels of the vectors.
        dim: channels of a token.
    """

    def __init__(self, context_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(context_dim)
        self.proj = nn.Linear(context_dim, dim)

    def forward(self, context: Tensor) -> Tensor:
        """Return the tokens (B, T, dim) of a context (B, T, context_dim + 1)."""
        return self.proj(self.norm(context[..., :-1]))

    def tokens(self, context: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Return the tokens (B, T, dim) of a context, in the place of those of a label."""
        if label_drop is not None:
            raise ValueError("a context is replaced as a whole, not dropped by the embedder")
        return self(context)
