"""What training changes: parameters, their moving average, the optimizer's moments, the step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.models.weights import load_strict
from rae_xla.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """The state of a run, on the devices.

    Attributes:
        model: what is trained; parameters with ``requires_grad=False`` stay as they are.
        ema: a second copy, the exponential moving average that is sampled and published.
        moments: AdamW's, ``exp_avg`` and ``exp_avg_sq``, each by the names of what is trained.
        step: optimizer steps taken.
    """

    model: nn.Module
    ema: nn.Module
    moments: dict[str, dict[str, Tensor]]
    step: int

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters the optimizer updates, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, ``<parameter>/<moment>`` -> tensor."""
        return {
            f"{name}/{moment}": tensor
            for moment, tensors in self.moments.items()
            for name, tensor in tensors.items()
        }


def make_state(
    model: nn.Module,
    runtime: Runtime,
    saved: Mapping[str, Any] | None = None,
    where: str = "checkpoint",
) -> TrainState:
    """Put a freshly built model on the devices with its EMA and moments, or restore all three.

    Everything is there before the first step: made lazily inside it, it would change the graph of
    the second.

    Args:
        model: on the CPU; its parameters are replaced by placed ones.
        runtime: where to.
        saved: ``model``, ``ema``, ``optimizer`` (host tensors) and ``step`` from a checkpoint.
        where: what to call that checkpoint in an error.

    Raises:
        UserError: when the checkpoint is of another model.
    """
    ema = copy.deepcopy(model)
    if saved is not None:
        load_strict(model, saved["model"], where)
        load_strict(ema, saved["ema"], where)
    runtime.place(model)
    runtime.place(ema.requires_grad_(False).eval())
    state = TrainState(model, ema, {}, step=0 if saved is None else int(saved["step"]))
    for moment in MOMENTS:
        host = {
            name: torch.zeros(p.shape) if saved is None else saved["optimizer"][f"{name}/{moment}"]
            for name, p in state.trained().items()
        }
        state.moments[moment] = runtime.place_tensors(host)
    return state


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """``ema <- decay * ema + (1 - decay) * model`` over every parameter; buffers are left alone."""
    averages = dict(ema.named_parameters())
    names, values = zip(*model.named_parameters(), strict=True)
    chosen: list[Tensor] = [averages[name] for name in names]
    torch._foreach_mul_(chosen, decay)
    torch._foreach_add_(chosen, list(values), alpha=1 - decay)
