"""Softmax attention, by the fused kernel where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor | None]] = {}
"""By type of device, what a runtime has for attention there; it answers None to what it cannot."""


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √d) v for (B, heads, N, d) tensors of one dtype -> (B, heads, N, d).

    XLA has no fused kernel behind ``scaled_dot_product_attention``: torch takes it apart, keeps the
    weights once in float32 and once in the dtype of the values, and looks for rows that are masked
    out in each of them. Written out, they are kept once.
    """
    kernel = KERNELS.get(query.device.type) if dropout == 0.0 else None
    if kernel is not None and (done := kernel(query, key, value)) is not None:
        return done
    if query.device.type == "xla" and dropout == 0.0:
        mixed: Tensor = _Attention.apply(query, key, value)
        return mixed
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class _Attention(torch.autograd.Function):
    """Attention whose backward pass keeps the weights in the dtype of the values.

    Products are written as sums over named dimensions: their transposes then cost no copy.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.5
            scores = torch.einsum("bhqd,bhkd->bhqk", query * scale, key)
            weights = scores.float().softmax(-1).to(value.dtype)
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, value)
        ctx.save_for_backward(query, key, value, weights, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, weights, mixed = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.5
            of_value = torch.einsum("bhqk,bhqd->bhkd", weights, gradient)
            of_weights = torch.einsum("bhqd,bhkd->bhqk", gradient, value).float()
            # the sum over k of weights * of_weights, without a pass over either (Dao et al. 2022)
            weighted = (gradient.float() * mixed.float()).sum(-1, keepdim=True)
            of_scores = weights.float() * (of_weights - weighted) * scale
            of_scores = of_scores.to(query.dtype)
            of_query = torch.einsum("bhqk,bhkd->bhqd", of_scores, key)
            of_key = torch.einsum("bhqk,bhqd->bhkd", of_scores, query)
        return of_query, of_key, of_value
