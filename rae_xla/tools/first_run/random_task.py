"""A task of real size with random numbers in place of weights, for timing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from rae_xla.config import RunConfig
from rae_xla.runtime import Backend
from rae_xla.tools.plan.networks import without_weights
from rae_xla.tools.plan.trace import build_task
from rae_xla.train.tasks.base import Task


def build_random_task(config: RunConfig, task_name: str, backend: Backend) -> Task:
    """Build a task on the CPU whose networks have random weights; no weight file is read.

    Args:
        config: of the run.
        task_name: key of ``rae_xla.train.tasks.TASKS``.
        backend: that the task runs on.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, _ = without_weights(config, Path(folder) / "encoder")
        with torch.device("meta"):
            task = build_task(config, task_name, backend)
    for module in (task.model, task.disc, task.frozen):
        if module is not None and any(t.is_meta for t in module.state_dict().values()):
            module.to_empty(device="cpu")
            _randomise(module)
    return task


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Fill parameters with small numbers, and buffers with numbers that nothing divides by zero."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.0)
        else:
            buffer.zero_()
