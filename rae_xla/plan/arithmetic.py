"""Parameters and FLOPs of a run's train step, counted by running it where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rae_xla.config import RunConfig
from rae_xla.plan.trace import build_stage, host_batch, last_step
from rae_xla.runtime import Runtime
from rae_xla.runtime.whole import WholeBatch
from rae_xla.train.flops import count_flops
from rae_xla.train.state import make_state


class MetaRuntime(WholeBatch):
    """A ``Runtime`` on torch's meta device: the parts of one that building a step asks for."""

    backend = "torch"
    device = torch.device("meta")
    process_index, process_count = 0, 1

    def place(self, module: nn.Module) -> nn.Module:
        """It is there already."""
        return module

    def place_tensors(self, tensors: Mapping[str, Tensor], *_: Any, **__: Any) -> dict[str, Tensor]:
        """They are there already."""
        return dict(tensors)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision changes no count."""
        return nullcontext()

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """As it is."""
        return fn


@dataclass(frozen=True)
class Arithmetic:
    """What one image costs and how large the networks are.

    Attributes:
        trained: parameters that the optimizer updates, over all networks.
        split: of those, the ones with two dimensions or more: what FSDP gathers and scatters.
        averaged: parameters of the moving average.
        frozen: parameters of the networks beside.
        step: FLOPs of the whole step, per image, without recomputation. A multiply-add is 2.
        phase: the kind of step that was counted.
        shapes: of the trained parameters.
    """

    trained: int
    split: int
    averaged: int
    frozen: int
    step: float
    phase: str
    shapes: tuple[tuple[int, ...], ...]


def count_arithmetic(config: RunConfig, stage_name: str) -> Arithmetic:
    """Count a step of the last kind of a run; the configuration must be ``without_weights``.

    Args:
        config: of the run.
        stage_name: ``stage1`` or ``stage2``.

    Raises:
        UserError: where the configuration does not describe a run that can be built.
    """
    runtime = cast("Runtime", MetaRuntime())
    number = last_step(config)
    with torch.device("meta"):
        stage = build_stage(config, stage_name, runtime)
        state = make_state(stage.model, runtime, disc=stage.disc)
        phase = stage.phase(number)
        step = stage.make_step(phase, state)
        rows = config.training.grad_accum_steps
        batch = host_batch(rows, config.data.image_size, stage, number)
        flops = count_flops(lambda: step(batch))
    trained = [t for t in (state.model, state.disc) if t is not None]
    parameters = [p for t in trained for p in t.parameters().values()]
    own = {id(p) for t in trained for p in t.module.parameters()}
    return Arithmetic(
        trained=sum(p.numel() for p in parameters),
        split=sum(p.numel() for p in parameters if p.dim() > 1),
        averaged=sum(p.numel() for p in state.ema.parameters()),
        frozen=sum(p.numel() for p in stage.frozen.parameters() if id(p) not in own),
        step=flops / rows,
        phase=str(phase),
        shapes=tuple(tuple(p.shape) for p in parameters),
    )
