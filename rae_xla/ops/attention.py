"""Softmax attention, dispatched on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rae_xla.ops import dispatch

MASKED = -1e30
"""Bias of the scores of keys that are not attended to; finite in bfloat16 too."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Compute softmax(q kᵀ / √d + bias) v.

    Implementations registered for ``"attention"`` are called with the three tensors; if there is a
    bias, with the bias too; if attention is causal, with None and True. They are called only when
    there is no dropout.

    Args:
        query: (B, heads, N, d); all three tensors have the same dtype.
        key: (B, heads, M, d).
        value: (B, heads, M, d).
        dropout: probability of dropping an attention weight.
        bias: float32, broadcasts to (B, heads, N, M) and needs no gradient; ``MASKED`` where a key
            is not attended to. Every query needs a key that is.
        causal: whether query i attends to keys 0 to i alone (N = M); not with a bias.

    Returns:
        (B, heads, N, d), in the dtype of ``value``.
    """
    if dropout == 0.0:
        further: tuple[Any, ...] = (None, True) if causal else () if bias is None else (bias,)
        result: Tensor | None = dispatch.call(
            "attention", query.device.type, query, key, value, *further
        )
        if result is not None:
            return result
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal
    )


def einsum_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Compute attention from einsum products, with one copy of the attention weights.

    XLA has no fused kernel behind ``scaled_dot_product_attention``: PyTorch decomposes it, stores
    the weights in float32 and again in the dtype of the values, and searches both for rows that
    are fully masked. This form stores them once, in the dtype of the values.
    """
    if causal:
        position = torch.arange(query.shape[2], device=query.device)
        bias = torch.where(position[:, None] >= position, 0.0, MASKED)
    result: Tensor = EinsumAttention.apply(query, key, value, bias)
    return result


class EinsumAttention(torch.autograd.Function):
    """Attention that saves its weights for the backward pass in the dtype of the values.

    Products are einsums over named dimensions, whose transposes cost no copy.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Compute attention of (B, heads, N, d) tensors."""
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.5
            scores = torch.einsum("bhqd,bhkd->bhqk", query * scale, key).float()
            if bias is not None:
                scores = scores + bias
            weights = scores.softmax(-1).to(value.dtype)
            result = torch.einsum("bhqk,bhkd->bhqd", weights, value)
        ctx.save_for_backward(query, key, value, weights, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of query, key and value."""
        query, key, value, weights, result = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.5
            grad_value = torch.einsum("bhqk,bhqd->bhkd", weights, grad)
            grad_weights = torch.einsum("bhqd,bhkd->bhqk", grad, value).float()
            # The sum over k of weights * grad_weights, computed without reading either again
            # (Dao et al. 2022, FlashAttention, appendix B).
            weighted_sum = (grad.float() * result.float()).sum(-1, keepdim=True)
            grad_scores = weights.float() * (grad_weights - weighted_sum) * scale
            grad_scores = grad_scores.to(query.dtype)
            grad_query = torch.einsum("bhqk,bhkd->bhqd", grad_scores, key)
            grad_key = torch.einsum("bhqk,bhqd->bhkd", grad_scores, query)
        return grad_query, grad_key, grad_value, None


dispatch.register("attention", "xla", einsum_attention)
