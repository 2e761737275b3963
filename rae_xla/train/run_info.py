"""Run information: code, hardware and size of a run, a line of ``environment.jsonl`` per start."""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
import subprocess
from collections.abc import Hashable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rae_xla
from rae_xla.checkpoint.provenance import code_version
from rae_xla.checkpoint.train_state import TrainState
from rae_xla.runtime import Backend
from rae_xla.train.cadence import Cadence
from rae_xla.train.tasks.base import Task

ENVIRONMENT_FILE = "environment.jsonl"


def describe_run(
    task_name: str,
    task: Task,
    state: TrainState,
    cadence: Cadence,
    backend: Backend,
    flops: Mapping[Hashable, float],
) -> dict[str, dict[str, Any]]:
    """Describe a run, in addition to its configuration, for wandb and the report.

    Args:
        task_name: such as ``stage1``.
        task: of the run.
        state: from which the run starts.
        cadence: of the run.
        backend: of the run.
        flops: per image, by phase; empty if they were not counted.

    Returns:
        The sections ``code``, ``hardware`` and ``plan``. Sizes are those of the whole run: numbers
        of elements, and bytes.
    """
    accelerator = backend.accelerator()
    trained = sum(p.numel() for p in state.model.module.parameters())
    disc = sum(p.numel() for p in state.disc.module.parameters()) if state.disc else 0
    tensors = [*state.model.module.state_dict().values(), *state.ema.state_dict().values()]
    tensors += state.model.optimizer_tensors().values()
    if state.disc is not None:
        tensors += state.disc.module.state_dict().values()
        tensors += state.disc.optimizer_tensors().values()
    return {
        "code": {
            "version": code_version(),
            "git": git_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "hardware": {
            "devices": backend.description,
            "chip": accelerator.name if accelerator is not None else None,
            "mesh": str(backend.mesh),
            "processes": backend.process_count,
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
        },
        "plan": {
            "stage": task_name,
            "first_step": state.step,
            "steps": cadence.total,
            "steps_per_epoch": cadence.per_epoch,
            "global_batch": cadence.global_batch,
            "images": cadence.total * cadence.global_batch,
            "parameters": trained,
            "discriminator_parameters": disc or None,
            "frozen_parameters": _count(task.frozen) - _count_shared(task),
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "flops_per_image": {str(phase): count for phase, count in flops.items()},
        },
    }


def append_run_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Append one start of a run to ``environment.jsonl``; raises ``OSError``."""
    line = {"started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **info}
    with (folder / ENVIRONMENT_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@functools.cache
def git_version() -> str | None:
    """Return the commit of the checkout that the package runs from; None outside a checkout.

    It ends in ``-dirty`` if files were changed since.
    """
    folder = Path(rae_xla.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=16"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_shared(task: Task) -> int:
    """Count the trained parameters that ``task.frozen`` contains."""
    own = {id(p) for m in (task.model, task.disc) if m is not None for p in m.parameters()}
    return sum(p.numel() for p in task.frozen.parameters() if id(p) in own)
