"""Two-dimensional rotary position embedding, dispatched on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.ops import dispatch
from rae_xla.ops.attention import attention

RopeTables = tuple[Tensor, Tensor, Tensor]
"""Tables (L, head_dim) for ``apply_rope``: the cosine, and the sine that multiplies the next and
the previous channel."""


class RotaryEmbedding(nn.Module):
    """Rotary position tables of a square token grid (RoFormer, Su et al. 2021, in two dimensions).

    The first half of a head's channels is rotated by the token's row, the second half by its
    column; each angle rotates two adjacent channels. ``freqs_cos`` and ``freqs_sin``,
    (grid_size² + num_extra, head_dim), are stored in the state dict, as published.

    Args:
        head_dim: channels of one attention head, a multiple of 4.
        grid_size: tokens along each side of the grid.
        num_extra: tokens after those of the grid, which are not rotated.

    Raises:
        UserError: if ``head_dim`` is not a multiple of 4.
    """

    def __init__(self, head_dim: int, grid_size: int, num_extra: int = 0) -> None:
        super().__init__()
        if head_dim % 4:
            raise UserError(
                f"use_rope: head_dim {head_dim} is not a multiple of 4 (row and column each rotate "
                "pairs of channels); choose another hidden_size or num_heads"
            )
        self.grid_size = grid_size
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor
        self.register_buffer("freqs_cos", torch.empty(grid_size**2 + num_extra, head_dim))
        self.register_buffer("freqs_sin", torch.empty(grid_size**2 + num_extra, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the two tables."""
        half = self.freqs_cos.shape[1] // 2
        device = self.freqs_cos.device
        channel = torch.arange(0, half, 2, device=device, dtype=torch.float64)
        # 10000: the base of RoFormer and of "Attention is all you need".
        frequency = 10000 ** -(channel / half)
        position = torch.arange(self.grid_size, device=device, dtype=torch.float64)
        angle = torch.outer(position, frequency).repeat_interleave(2, dim=1)
        shape = (self.grid_size, self.grid_size, half)
        grid = torch.cat([angle[:, None].expand(shape), angle[None].expand(shape)], dim=-1)
        positions = self.grid_size**2
        self.freqs_cos[:positions].copy_(grid.cos().flatten(0, 1))
        self.freqs_sin[:positions].copy_(grid.sin().flatten(0, 1))
        self.freqs_cos[positions:].fill_(1.0)  # an angle of 0
        self.freqs_sin[positions:].fill_(0.0)

    def forward(self) -> RopeTables:
        """Return the tables for ``apply_rope``."""
        even = torch.arange(self.freqs_sin.shape[1], device=self.freqs_sin.device) % 2 == 0
        sin_next = torch.where(even, -self.freqs_sin, 0.0)
        sin_previous = torch.where(even, 0.0, self.freqs_sin)
        return self.freqs_cos, sin_next, sin_previous


def apply_rope(x: Tensor, rope: RopeTables) -> Tensor:
    """Rotate each pair (a, b) of adjacent channels to (a cos - b sin, b cos + a sin).

    Implementations registered for ``"apply_rope"`` are called with ``x`` and the three tables,
    repeated to one row per token.

    Args:
        x: queries or keys (B, heads, L, head_dim).
        rope: tables with L rows, or with L / k rows of which each serves k consecutive tokens.

    Returns:
        (B, heads, L, head_dim), in the dtype of ``x``.
    """
    tables = _repeated(rope, x.shape[-2])
    result: Tensor | None = dispatch.call("apply_rope", x.device.type, x, *tables)
    return _rotate(x, *tables) if result is None else result


def rotary_attention(
    query: Tensor, key: Tensor, value: Tensor, rope: RopeTables, bias: Tensor | None = None
) -> Tensor:
    """Compute attention after rotating queries and keys.

    Implementations registered for ``"rotary_attention"`` are called with the three tensors and the
    three tables, repeated to one row per token, if there is no bias and all have the same dtype.

    Args:
        query: (B, heads, L, head_dim).
        key: like ``query``.
        value: like ``query``; its dtype may differ, and is that of the attention.
        rope: tables of ``apply_rope``.
        bias: of ``attention``.

    Returns:
        (B, heads, L, head_dim), in the dtype of ``value``.
    """
    if bias is None and query.dtype == key.dtype == value.dtype:
        tables = _repeated(rope, query.shape[-2])
        result: Tensor | None = dispatch.call(
            "rotary_attention", query.device.type, query, key, value, *tables
        )
        if result is not None:
            return result
    query, key = apply_rope(query, rope), apply_rope(key, rope)
    return attention(query.to(value.dtype), key.to(value.dtype), value, bias=bias)


def _repeated(rope: RopeTables, tokens: int) -> Sequence[Tensor]:
    """Repeat the rows of the tables to one per token."""
    repeats = tokens // rope[0].shape[0]
    return rope if repeats == 1 else [table.repeat_interleave(repeats, dim=0) for table in rope]


def rotate_with_fused_backward(
    x: Tensor, cos: Tensor, sin_next: Tensor, sin_previous: Tensor
) -> Tensor:
    """Rotate channel pairs as ``apply_rope`` does, with the gradient computed in one expression.

    Autograd's gradient has three terms. XLA materialises each of them in the dtype of ``x``, for
    queries and for keys, which costs memory traffic and, in bfloat16, three roundings.
    """
    result: Tensor = RotateWithFusedBackward.apply(x, cos, sin_next, sin_previous)
    return result


class RotateWithFusedBackward(torch.autograd.Function):
    """Rotation of channel pairs whose backward pass is one rotation by the transposed tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin_next: Tensor, sin_previous: Tensor) -> Tensor:
        """Rotate (B, heads, L, head_dim) by three tables (L, head_dim)."""
        ctx.save_for_backward(cos, sin_next, sin_previous)
        return _rotate(x, cos, sin_next, sin_previous)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Rotate the gradient by the transposed tables."""
        cos, sin_next, sin_previous = ctx.saved_tensors
        return _rotate(grad, cos, sin_previous.roll(-1, -1), sin_next.roll(1, -1)), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin_next: Tensor, sin_previous: Tensor) -> Tensor:
    # Rolling along the channels, rather than viewing them as pairs, keeps a last dimension of 2
    # (padded to 128 lanes on TPU) out of the graph: 12% less memory traffic in two XL blocks.
    rotated = x * cos + x.roll(-1, -1) * sin_next + x.roll(1, -1) * sin_previous
    return rotated.to(x.dtype)


dispatch.register("apply_rope", "xla", rotate_with_fused_backward)
