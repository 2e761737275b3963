"""Rematerialisation on XLA: a second pass that the compiler must not merge with the first.

A barrier stands between the two: XLA removes common subexpressions, and the second pass is one. The
parameters pass it too: what is gathered for the first pass is let go and gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor


def recompute(
    run: Callable[..., Tensor], parameters: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """``run(*parameters, *inputs)``, and once more in the backward pass."""
    result: Tensor = _Recomputed.apply(run, *parameters, *inputs)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        device = tensors[0].device.type
        ctx.run = run
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Copies: the barrier is put into the tensors it is given, and these are the parameters.
        apart = [tensor.clone() for tensor in (gradient, *ctx.saved_tensors)]
        xm.optimization_barrier_(apart)
        gradient, *tensors = apart
        needed = ctx.needs_input_grad[1:]
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.requires_grad_(need)
        enabled, dtype = ctx.autocast
        with (
            torch.enable_grad(),
            torch.autocast(gradient.device.type, dtype=dtype, enabled=enabled),
        ):
            result = ctx.run(*tensors)
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, gradient))
        return None, *(next(found) if need else None for need in needed)
