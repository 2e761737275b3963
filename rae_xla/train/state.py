"""What training changes: parameters, their moving average, the optimizer's moments, the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.weights import load_strict
from rae_xla.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Trained:
    """A module on the devices and the state of the optimizer that trains it.

    Attributes:
        module: parameters with ``requires_grad=False`` stay as they are.
        moments: AdamW's, ``exp_avg`` and ``exp_avg_sq``, each by the names of what is trained.
    """

    module: nn.Module
    moments: dict[str, dict[str, Tensor]]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters the optimizer updates, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, ``<parameter>/<moment>`` -> tensor."""
        return {
            f"{name}/{moment}": tensor
            for moment, tensors in self.moments.items()
            for name, tensor in tensors.items()
        }


@dataclass
class TrainState:
    """The state of a run, on the devices.

    Attributes:
        model: what is trained.
        ema: a second copy, the exponential moving average that is sampled and published.
        step: optimizer steps taken.
        disc: the discriminator, where there is one.
    """

    model: Trained
    ema: nn.Module
    step: int
    disc: Trained | None = None


def make_state(
    model: nn.Module,
    runtime: Runtime,
    saved: Mapping[str, Any] | None = None,
    where: str = "checkpoint",
    disc: nn.Module | None = None,
) -> TrainState:
    """Put freshly built models on the devices with EMA and moments, or restore all of it.

    Everything is there before the first step: made lazily inside it, it would change the graph of
    the second.

    Args:
        model: on the CPU; its parameters are replaced by placed ones.
        runtime: where to.
        saved: ``model``, ``ema``, ``optimizer`` (host tensors) and ``step`` from a checkpoint; with
            a discriminator ``disc`` and ``disc_optimizer`` too.
        where: what to call that checkpoint in an error.
        disc: a discriminator that is trained beside, on the CPU.

    Raises:
        UserError: when the checkpoint is of another model.
    """
    ema = copy.deepcopy(model)
    if saved is not None:
        load_strict(model, saved["model"], where)
        load_strict(ema, saved["ema"], where)
        if disc is not None:
            if "disc" not in saved or "disc_optimizer" not in saved:
                raise UserError(f"{where} has no discriminator, but this run trains one")
            load_strict(disc, saved["disc"], where)
    moments = _host_moments(model, saved and saved["optimizer"])
    runtime.place(model)
    runtime.place(ema.requires_grad_(False).eval())
    trained = _with_moments(model, runtime, moments)
    state = TrainState(trained, ema, step=0 if saved is None else int(saved["step"]))
    if disc is not None:
        moments = _host_moments(disc, saved and saved["disc_optimizer"])
        state.disc = _with_moments(runtime.place(disc), runtime, moments)
    return state


def _host_moments(
    module: nn.Module, saved: Mapping[str, Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """Zeros or what was saved, for a module on the host."""
    trained = Trained(module, {}).parameters()
    return {
        moment: {
            name: torch.zeros(p.shape) if saved is None else saved[f"{name}/{moment}"]
            for name, p in trained.items()
        }
        for moment in MOMENTS
    }


def _with_moments(
    module: nn.Module, runtime: Runtime, moments: dict[str, dict[str, Tensor]]
) -> Trained:
    """A placed module with its moments, split as its parameters are."""
    placed = {moment: runtime.place_tensors(moments.pop(moment), like=module) for moment in MOMENTS}
    return Trained(module, placed)


@torch.no_grad()
def update_ema(
    ema: nn.Module,
    model: nn.Module,
    decay: float,
    parts: Callable[[Sequence[Tensor]], list[Tensor]] = list,
) -> None:
    """``ema <- decay * ema + (1 - decay) * model`` over every parameter; buffers are left alone.

    ``parts`` is the runtime's: this process averages what it holds of both, split alike.
    """
    averages = dict(ema.named_parameters())
    names, values = zip(*model.named_parameters(), strict=True)
    chosen = parts([averages[name] for name in names])
    torch._foreach_mul_(chosen, decay)
    torch._foreach_add_(chosen, parts(values), alpha=1 - decay)
