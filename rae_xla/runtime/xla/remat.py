"""Rematerialisation on XLA: a second forward pass that the compiler does not merge with the first.

XLA removes common subexpressions, and a recomputation is one. An optimisation barrier separates the
two passes. Parameters pass through it too, so that gathered weights are freed after the first pass
and gathered again for the second. It costs one forward pass of the block and frees its activations
(Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor, nn

from rae_xla.runtime.blocks import evenly_spread
from rae_xla.runtime.xla import compat


def rematerialise(blocks: Sequence[nn.Module], share: float) -> None:
    """Make ``share`` of the blocks, evenly spread, recompute their activations.

    The ``forward`` of a block is replaced on the instance: its class, hooks, parameters and
    state-dict keys stay as they are. ``torch_xla.utils.checkpoint`` supports ``backward()`` but not
    ``torch.autograd.grad``, and inserts the barrier into the parameters themselves.

    Args:
        blocks: modules that take tensors, or tuples of them, and return a tensor. Arguments
            without a gradient, such as flags, and keywords are passed on.
        share: 0 to 1.
    """
    for block in evenly_spread(blocks, share):
        block.forward = partial(_rematerialised, block, block.forward)


def _rematerialised(
    block: nn.Module, forward: Callable[..., Tensor], *inputs: Any, **keywords: Any
) -> Tensor:
    names, parameters = zip(*block.named_parameters(), strict=True)
    leaves, structure = compat.flatten((inputs, keywords))

    def run(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors, strict=False))
        given = iter(tensors[len(names) :])
        nested, options = structure.unflatten(
            [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        )
        call = partial(forward, **options)
        result: Tensor = compat.call_with_parameters(block, call, values, nested)
        return result

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    result: Tensor = _Recomputed.apply(run, *parameters, *tensors)
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
        # Cloned, because the barrier is inserted in place and some of these are parameters.
        separated = [tensor.clone() for tensor in (gradient, *ctx.saved_tensors)]
        xm.optimization_barrier_(separated)
        gradient, *tensors = separated
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
