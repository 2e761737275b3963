"""What training changes: parameters, their moving average, the optimizer's moments, the step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rae_xla.models.weights import load_strict
from rae_xla.runtime import Runtime

if TYPE_CHECKING:
    from rae_xla.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """The state of a run, on the devices.

    Attributes:
        model: what is trained; parameters with ``requires_grad=False`` stay as they are.
        ema: a second copy, the exponential moving average that is sampled and published.
        optimizer: AdamW over the trained parameters, its moments allocated from the start.
        step: optimizer steps taken.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.AdamW
    step: int

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters the optimizer updates, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, ``<parameter>/<moment>`` -> tensor."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.trained().items()
            for key, value in self.optimizer.state[parameter].items()
        }


def make_state(
    model: nn.Module,
    settings: OptimizerConfig,
    runtime: Runtime,
    saved: Mapping[str, Any] | None = None,
    where: str = "checkpoint",
) -> TrainState:
    """Put a freshly built model on the devices with its EMA and optimizer, or restore all three.

    Args:
        model: on the CPU; its parameters are replaced by placed ones.
        settings: AdamW's learning rate, betas, weight decay and epsilon.
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
    on_xla, on_cuda = runtime.backend == "xla", runtime.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr,  # the step replaces it by a tensor, so that no rate is baked into a graph
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        # one kernel over all parameters where there is one; on XLA the step compiles into one
        fused=not on_xla,
        capturable=on_xla or on_cuda,
        foreach=False,
    )
    state = TrainState(model, ema, optimizer, step=0 if saved is None else int(saved["step"]))
    _allocate_moments(state, runtime, None if saved is None else saved["optimizer"])
    return state


def _allocate_moments(
    state: TrainState, runtime: Runtime, saved: Mapping[str, Tensor] | None
) -> None:
    """Create the optimizer's state now: made lazily inside the first step, it would change the
    compiled graph of the second.
    """
    trained = state.trained()
    for key in (*MOMENTS, "step"):
        host = {
            name: torch.zeros(p.shape if key != "step" else ()) if saved is None
            else saved[f"{name}/{key}"]
            for name, p in trained.items()
        }  # fmt: skip
        placed = runtime.place_tensors(host)
        for name, parameter in trained.items():
            state.optimizer.state[parameter][key] = placed[name]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """``ema <- decay * ema + (1 - decay) * model`` over every parameter; buffers are left alone."""
    averages = dict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)
