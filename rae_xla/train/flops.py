"""How many floating-point operations a training step takes, counted rather than estimated.

The step itself is run on shapes alone (fake tensors: nothing is computed, nothing allocated), and
its matrix products and convolutions are counted: the forward and backward pass of what is trained,
the forward pass of the frozen encoder, in stage 1 the losses' networks too. Elementwise work is not
counted, and neither is what rematerialisation computes again: by convention model FLOPs are those
the mathematics needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rae_xla.runtime import Runtime
from rae_xla.runtime.whole import WholeBatch
from rae_xla.train.stage import Stage
from rae_xla.train.state import MOMENTS, Trained, TrainState


class _Nowhere(WholeBatch):
    """Of a ``Runtime`` what a step asks for, where there is no device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision changes no count."""
        return nullcontext()


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of a call, where a multiply-add is two. Run it on fake or meta tensors.

    Attention is counted as the two matrix products it is: torch has no formula for its fused kernel
    on the CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return int(counter.get_total_flops())


def step_flops(stage: Stage, step: int, image_size: int, rows: int = 1) -> float:
    """FLOPs per image of step number ``step`` of a run.

    Args:
        stage: not yet on the devices; it stays as it was.
        step: steps of one phase cost the same.
        image_size: side of an image in pixels.
        rows: images to count with: at least the parts a batch is worked through in.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = TrainState(_trained(stage.model), stage.model, step)
        if stage.disc is not None:
            state.disc = _trained(stage.disc)
        batch = {
            "image": torch.zeros(rows, 3, image_size, image_size, dtype=torch.uint8),
            "label": torch.zeros(rows, dtype=torch.int64),
            "row": torch.arange(rows, dtype=torch.int32),
            "step": torch.tensor(step, dtype=torch.int32),
        }
        taken = stage.make_step(stage.phase(step), state, cast("Runtime", _Nowhere()))
        flops = count_flops(lambda: taken.figures(batch | stage.inputs(step)))
    for module in (stage.model, stage.disc):
        if module is not None:
            module.zero_grad(set_to_none=True)
    return flops / rows


def phase_flops(
    stage: Stage, start: int, stop: int, image_size: int, rows: int = 1
) -> dict[Hashable, float]:
    """FLOPs per image of every phase that the steps from ``start`` to ``stop`` go through."""
    found: dict[Hashable, float] = {}
    for step in range(start, stop):
        if (phase := stage.phase(step)) not in found:
            found[phase] = step_flops(stage, step, image_size, rows)
    return found


def _trained(module: torch.nn.Module) -> Trained:
    trained = Trained(module, {})
    for moment in MOMENTS:
        trained.moments[moment] = {
            name: torch.zeros(parameter.shape) for name, parameter in trained.parameters().items()
        }
    return trained
