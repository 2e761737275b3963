"""Flash attention on TPU: the attention weights of long sequences stay in on-chip memory.

The kernels are jax's splash attention in Pallas (after Dao et al. 2022, "FlashAttention").
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.runtime.xla.kernel_calls import call_on_shards, divides_evenly
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh

AUTO_TOKENS = 1024
"""Number of tokens from which ``runtime.attention: auto`` uses the kernels."""

JAX_VERSION = "0.7.1"
"""The jax that torch_xla 2.9 is built against; its internals are used (see ``jax_programs``)."""


def minimum_tokens(setting: str, precision: str, *, tpu: bool) -> int | None:
    """Return the number of tokens from which attention uses kernels; None if it uses none.

    From 0 tokens on, those of ``whole_attention`` are among them: ``auto`` leaves them out, because
    whether they are faster was not measured on a TPU.

    Args:
        setting: ``runtime.attention``.
        precision: ``runtime.precision``.
        tpu: whether the run computes on TPUs.

    Raises:
        UserError: the setting requires the kernels, and they are not available.
    """
    problem = _problem(precision, tpu)
    if setting == "flash" and problem:
        raise UserError(f"runtime.attention is flash, but {problem} (or set it to auto)")
    if setting == "plain" or problem:
        return None
    return 0 if setting == "flash" else AUTO_TOKENS


def describe_attention(setting: str, precision: str, *, tpu: bool) -> str:
    """Return which attention a run uses, and why if ``auto`` cannot use the kernels on TPUs."""
    tokens = minimum_tokens(setting, precision, tpu=tpu)
    if tokens is not None:
        return "attention kernels" + (f" from {tokens} tokens on" if tokens else "")
    problem = _problem(precision, tpu) if tpu and setting == "auto" else ""
    return "plain attention" + (f" (flash attention: {problem})" if problem else "")


def _problem(precision: str, tpu: bool) -> str:
    """Return why the kernels are not available; empty if they are."""
    if not tpu:
        return "its kernels run only on TPUs, and this machine has none"
    if (found := installed_version("jax")) != JAX_VERSION:
        remedy = f"pip install jax=={JAX_VERSION}"
        if sys.version_info < (3, 11):
            remedy = "it needs Python 3.11: remove .venv and run install_spmd.sh again"
        return f"its kernels need jax {JAX_VERSION}, not {found or 'none'}: {remedy}"
    if precision != "bf16":
        return f"its kernels compute in bf16, and runtime.precision is {precision}"
    return ""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class FlashAttention:
    """An implementation of ``rae_xla.ops.attention`` for XLA devices.

    Args:
        mesh: of the run; it must be torch_xla's global mesh.
        minimum_tokens: number of tokens from which the kernels are used.
        interpret: run the arithmetic of the kernels on a CPU, for tests.
    """

    def __init__(self, mesh: SpmdMesh, minimum_tokens: int, *, interpret: bool = False) -> None:
        from rae_xla.runtime.xla import flash_kernels  # requires jax

        self._lanes = flash_kernels.LANES
        self._minimum_tokens, self._interpret = minimum_tokens, interpret
        self._mesh = mesh

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
            (B, heads, N, d). None if the kernels do not support the shapes: N is below the minimum
            or not a multiple of 128, lengths differ, or B and heads do not divide by the mesh; or
            if there is a bias.
        """
        if bias is not None:
            return None
        tokens = query.shape[2]
        if tokens < self._minimum_tokens or tokens % self._lanes:
            return None
        if not divides_evenly(query, self._mesh):
            return None
        if key.shape != query.shape or value.shape != query.shape:
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            result: Tensor = _FlashAttention.apply(query, key, value, causal, self._interpret)
            return result
        return _flash_forward(query, key, value, False, causal, self._interpret)[0]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, interpret: bool
    ) -> Tensor:
        result, log_sums = _flash_forward(query, key, value, True, causal, interpret)
        ctx.options = causal, interpret
        ctx.save_for_backward(query, key, value, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_flash_backward(*ctx.saved_tensors, gradient, *ctx.options), None, None


# Custom operators, which the graph of a scan over blocks can hold. Their arguments can only be
# tensors, numbers and text: the mesh is torch_xla's global one.


@torch.library.custom_op("rae_xla::flash_forward", mutates_args=())
def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, training: bool, causal: bool, interpret: bool
) -> list[Tensor]:
    """Return the result of attention and, in training, the logarithms of the softmax's sums."""
    from rae_xla.runtime.xla import flash_kernels

    function = flash_kernels.forward if training else flash_kernels.result
    return call_on_shards(function, [query, key, value], interpret=interpret, causal=causal)


@torch.library.custom_op("rae_xla::flash_backward", mutates_args=())
def _flash_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    log_sums: Tensor,
    gradient: Tensor,
    causal: bool,
    interpret: bool,
) -> list[Tensor]:
    """Return the gradients of query, key and value."""
    from rae_xla.runtime.xla import flash_kernels

    tensors = [query, key, value, result, log_sums, gradient]
    return call_on_shards(flash_kernels.backward, tensors, interpret=interpret, causal=causal)


@_flash_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, training: bool, causal: bool, interpret: bool
) -> list[Tensor]:
    result = torch.empty_like(query)
    log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return [result, log_sums] if training else [result]


@_flash_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    log_sums: Tensor,
    gradient: Tensor,
    causal: bool,
    interpret: bool,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (query, key, value)]
