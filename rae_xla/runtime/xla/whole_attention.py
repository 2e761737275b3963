"""Attention of short sequences on TPU: the scores of a whole sequence stay in on-chip memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rae_xla.runtime.xla.kernel_calls import call_on_shards, divides_evenly
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh


class WholeAttention:
    """An implementation of ``rae_xla.ops.attention`` for XLA devices, without bias.

    Args:
        mesh: of the run; it must be torch_xla's global mesh.
        interpret: run the arithmetic of the kernels on a CPU, for tests.
    """

    def __init__(self, mesh: SpmdMesh, *, interpret: bool = False) -> None:
        from rae_xla.runtime.xla import flash_kernels, whole_kernels  # require jax

        self._max_tokens, self._lanes = whole_kernels.MAX_TOKENS, flash_kernels.LANES
        self._sublanes = whole_kernels.SUBLANES
        self._mesh, self._interpret = mesh, interpret

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor | None:
        """Compute softmax(q kᵀ / √d) v.

        Args:
            query: (B, heads, N, d); all three tensors have the same dtype.
            key: like ``query``.
            value: like ``query``.
            bias: of the scores.
            causal: whether a query attends to no later key.

        Returns:
            (B, heads, N, d). None if the kernels do not support the arguments: N is above 512 or
            not a multiple of 128, d is not a multiple of 8, lengths differ, B and heads do not
            divide by the mesh, the dtype is not bfloat16, there is a bias, or attention is causal.
        """
        if bias is not None or causal:
            return None
        return self._attend(query, key, value, [])

    def rotary(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin_next: Tensor,
        sin_previous: Tensor,
    ) -> Tensor | None:
        """Compute attention of rotated queries and keys, see ``rae_xla.ops.rotary_attention``.

        Args:
            query: (B, heads, N, d); all three tensors have the same dtype.
            key: like ``query``.
            value: like ``query``.
            cos: (N, d), like the other two tables.
            sin_next: see ``rae_xla.ops.rotary.RopeTables``.
            sin_previous: see ``rae_xla.ops.rotary.RopeTables``.

        Returns:
            (B, heads, N, d), or None if the kernels do not support the shapes or the dtype.
        """
        return self._attend(query, key, value, [cos, sin_next, sin_previous])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor]
    ) -> Tensor | None:
        if query.dtype != torch.bfloat16 and not self._interpret:
            return None  # networks that compute in float32 whatever the run's precision
        if not key.shape == query.shape == value.shape:
            return None
        tokens, channels = query.shape[2:]
        if tokens > self._max_tokens or tokens % self._lanes or channels % self._sublanes:
            return None
        if not divides_evenly(query, self._mesh):
            return None
        result: Tensor = _WholeAttention.apply(query, key, value, self._interpret, *tables)
        return result


class _WholeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, interpret: bool, *tables: Tensor
    ) -> Tensor:
        ctx.interpret = interpret
        ctx.save_for_backward(query, key, value, *tables)
        return _whole_forward(query, key, value, list(tables), interpret)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *tables = ctx.saved_tensors
        found = _whole_backward(query, key, value, gradient, tables, ctx.interpret)
        return *found, None, *(None for _ in tables)


# Custom operators, which the graph of a scan over blocks can hold. Their arguments can only be
# tensors, numbers and text: the mesh is torch_xla's global one.


@torch.library.custom_op("rae_xla::whole_forward", mutates_args=())
def _whole_forward(
    query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor], interpret: bool
) -> Tensor:
    """Return the result of attention."""
    from rae_xla.runtime.xla import whole_kernels

    tensors = [query, key, value]
    [result] = call_on_shards(whole_kernels.whole_result, tensors, tables, interpret=interpret)
    return result


@torch.library.custom_op("rae_xla::whole_backward", mutates_args=())
def _whole_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    tables: list[Tensor],
    interpret: bool,
) -> list[Tensor]:
    """Return the gradients of query, key and value."""
    from rae_xla.runtime.xla import whole_kernels

    tensors = [query, key, value, gradient]
    return call_on_shards(whole_kernels.whole_gradients, tensors, tables, interpret=interpret)


@_whole_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor], interpret: bool) -> Tensor:
    return torch.empty_like(query)


@_whole_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    tables: list[Tensor],
    interpret: bool,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (query, key, value)]
