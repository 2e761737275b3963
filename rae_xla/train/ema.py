"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(
    ema: nn.Module,
    model: nn.Module,
    decay: float,
    local_shards: Callable[[Sequence[Tensor]], list[Tensor]] = list,
) -> None:
    """Set every parameter of ``ema`` to ``decay * ema + (1 - decay) * model``, in place.

    Buffers stay as they are.

    Args:
        ema: a copy of ``model``, sharded in the same way.
        model: the module that is trained.
        decay: of the average, in [0, 1].
        local_shards: ``Backend.local_shards``; each process averages its own shards.
    """
    averages = dict(ema.named_parameters())
    names, values = zip(*model.named_parameters(), strict=True)
    chosen = local_shards([averages[name] for name in names])
    torch._foreach_mul_(chosen, decay)
    torch._foreach_add_(chosen, local_shards(values), alpha=1 - decay)
