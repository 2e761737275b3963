"""Moving averages of the weights: the exponential one, and power-function averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.power_profiles import exponent
from rae_xla.checkpoint.train_state import TrainState
from rae_xla.ops.eager_random import runs_eagerly
from rae_xla.ops.updates import average_
from rae_xla.runtime import Backend


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
    average_(local_shards([averages[name] for name in names]), local_shards(values), decay)


@torch.no_grad()
def update_power_averages(state: TrainState, step: Tensor, backend: Backend) -> None:
    """Add the weights after a step to the power-function averages of a state, in place.

    Averages have forgotten the initial weights after the first step: its share is 1.

    Args:
        state: with the updated weights.
        step: 0-d int32, the number of earlier steps.
        backend: holds the state.
    """
    parameters = state.model.parameters()
    for width, averages in state.averages.items():
        # 1 - (step / (step + 1)) ** exponent, accurate to float32 when it is small
        share = -torch.expm1(exponent(width) * torch.log1p(-1 / (step + 1)))
        shards = backend.local_shards(list(averages.values()))
        weights = backend.local_shards([parameters[name] for name in averages])
        if runs_eagerly(step.device):  # one pass over the tensors, without temporary copies
            torch._foreach_lerp_(shards, weights, [share] * len(shards))
            continue
        changes = torch._foreach_sub(weights, shards)
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(shards, changes)
