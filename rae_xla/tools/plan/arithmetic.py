"""Parameter and FLOP counts of a run's train step, obtained by running it on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import RunConfig
from rae_xla.runtime import Backend
from rae_xla.runtime.backend import GlobalArithmetic
from rae_xla.tools.plan.trace import build_task, host_batch, last_step
from rae_xla.train.flops import count_flops


class MetaBackend(GlobalArithmetic):
    """The part of ``Backend`` that building a step needs, on torch's meta device."""

    name = "torch"
    device = torch.device("meta")
    process_index, process_count = 0, 1

    def place(self, module: nn.Module) -> nn.Module:
        """Return the module; constants that were built on the CPU move to the meta device."""
        return module.to(self.device)

    def place_tensors(self, tensors: Mapping[str, Tensor], *_: Any, **__: Any) -> dict[str, Tensor]:
        """Return the tensors, which were created on the meta device."""
        return dict(tensors)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a null context: counts do not depend on the precision."""
        return nullcontext()

    def apply_to_matrices(
        self, function: Callable[[Tensor], Tensor], stack: Tensor, dimension: int | None
    ) -> Tensor:
        """Return the matrices: the cost of the optimizer does not depend on the images."""
        return stack

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function itself."""
        return fn


@dataclass(frozen=True)
class ModelCounts:
    """Sizes of the networks and FLOPs of the step.

    Attributes:
        trained: parameters that the optimizer updates, over all networks.
        split: those of them with two or more dimensions, which FSDP gathers and scatters.
        averaged: parameters of the moving averages.
        frozen: parameters of the networks that are not trained.
        step: FLOPs of the step per image, without recomputation; a multiply-add counts as 2.
        phase: phase of the run that the step belongs to.
        shapes: shapes of the trained parameters.
        moments: elements of the optimizer's state.
    """

    trained: int
    split: int
    averaged: int
    frozen: int
    step: float
    phase: str
    shapes: tuple[tuple[int, ...], ...]
    moments: int


def count_model(config: RunConfig, task_name: str) -> ModelCounts:
    """Count parameters and FLOPs of a step of the last phase of a run.

    Args:
        config: of the run, as ``networks.without_weights`` returns it.
        task_name: key of ``rae_xla.train.tasks.TASKS``.

    Raises:
        UserError: if the configuration does not describe a run that can be built.
    """
    backend = cast("Backend", MetaBackend())
    number = last_step(config)
    with torch.device("meta"):
        task = build_task(config, task_name, backend)
        state = make_state(
            task.model,
            backend,
            disc=task.disc,
            first_moment_only=task.first_moment_only,
            average_widths=task.average_widths,
        )
        phase = task.phase(number)
        step = task.make_step(phase, state)
        rows = task.smallest_batch
        batch = host_batch(rows, config.data.image_size, task, number)
        flops = count_flops(lambda: step(batch))
    trained = [t for t in (state.model, state.disc) if t is not None]
    parameters = [p for t in trained for p in t.parameters().values()]
    trained_ids = {id(p) for t in trained for p in t.module.parameters()}
    return ModelCounts(
        trained=sum(p.numel() for p in parameters),
        split=sum(p.numel() for p in parameters if p.dim() > 1),
        averaged=sum(p.numel() for p in state.ema.parameters())
        + sum(t.numel() for of in state.averages.values() for t in of.values()),
        frozen=sum(p.numel() for p in task.frozen.parameters() if id(p) not in trained_ids),
        step=flops / rows,
        phase=str(phase),
        shapes=tuple(tuple(p.shape) for p in parameters),
        moments=sum(m.numel() for t in trained for m in t.optimizer_tensors().values()),
    )
