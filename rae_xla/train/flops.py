"""FLOPs of a train step, counted rather than estimated.

The step runs on fake tensors: nothing is computed or allocated. Counted are matrix products and
convolutions: forward and backward pass of the trained model, forward pass of the frozen encoder,
and in stage 1 the networks of the losses. Elementwise operations are not counted, nor is what
rematerialisation computes again: by convention, model FLOPs are those that the mathematics needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rae_xla.checkpoint.train_state import MOMENTS, TrainedModule, TrainState
from rae_xla.runtime import Backend
from rae_xla.runtime.backend import GlobalArithmetic
from rae_xla.train.tasks.base import Task


class _FakeBackend(GlobalArithmetic):
    """The part of ``Backend`` that a step uses, for fake tensors."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context without effect: the precision does not change the count."""
        return nullcontext()

    def apply_to_matrices(
        self, function: Callable[[Tensor], Tensor], stack: Tensor, dimension: int | None
    ) -> Tensor:
        """Return the matrices: the cost of the optimizer does not depend on the images."""
        return stack


def count_flops(function: Callable[[], object]) -> int:
    """Count the FLOPs of a call on fake or meta tensors; a multiply-add counts as two.

    Attention is counted as its two matrix products, since torch has no formula for its fused kernel
    on the CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return int(counter.get_total_flops())


def step_flops(task: Task, step: int, image_size: int, rows: int = 1) -> float:
    """Count the FLOPs per image of step number ``step`` of a run.

    Args:
        task: not yet on the devices; it is not changed.
        step: all steps of a phase cost the same.
        image_size: side of an image in pixels.
        rows: batch size to count with, rounded up to ``Task.smallest_batch``.
    """
    rows = -(-rows // task.smallest_batch) * task.smallest_batch
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = _trained(task.model, task.first_moment_only)
        state = TrainState(trained, task.model, step)
        if task.disc is not None:
            state.disc = _trained(task.disc)
        batch = task.example_batch(rows, image_size) | {
            "row": torch.arange(rows, dtype=torch.int32),
            "step": torch.tensor(step, dtype=torch.int32),
        }
        train_step = task.make_step(task.phase(step), state, cast("Backend", _FakeBackend()))
        flops = count_flops(lambda: train_step.fn(batch | task.inputs(step)))
    for module in (task.model, task.disc):
        if module is not None:
            module.zero_grad(set_to_none=True)
    return flops / rows


def phase_flops(
    task: Task, start: int, stop: int, image_size: int, rows: int = 1
) -> dict[Hashable, float]:
    """Count the FLOPs per image of every phase of the steps from ``start`` to ``stop``."""
    found: dict[Hashable, float] = {}
    for step in range(start, stop):
        if (phase := task.phase(step)) not in found:
            found[phase] = step_flops(task, step, image_size, rows)
    return found


def _trained(module: torch.nn.Module, first_only: Collection[str] = ()) -> TrainedModule:
    trained = TrainedModule(module, {})
    for moment in MOMENTS:
        trained.moments[moment] = {
            name: torch.zeros(parameter.shape)
            for name, parameter in trained.parameters().items()
            if moment == MOMENTS[0] or name not in first_only
        }
    return trained
