"""What a run was started with: code, machine, size. A line of ``environment.jsonl`` per start."""

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
from rae_xla.runtime import Runtime
from rae_xla.train.plan import Plan
from rae_xla.train.same_run import code_version
from rae_xla.train.stage import Stage
from rae_xla.train.state import TrainState

ENVIRONMENT_FILE = "environment.jsonl"


def describe_start(
    stage_name: str,
    stage: Stage,
    state: TrainState,
    plan: Plan,
    runtime: Runtime,
    flops: Mapping[Hashable, float],
) -> dict[str, dict[str, Any]]:
    """What wandb and the report show of a run beside its configuration.

    Args:
        stage_name: ``stage1`` or ``stage2``.
        stage: of the run.
        state: as the run goes on from it.
        plan: of the run.
        runtime: where it computes.
        flops: per image, by phase; empty where they were not counted.

    Returns:
        ``code``, ``hardware`` and ``plan``. Sizes are of the whole run: numbers of elements, bytes.
    """
    chip = runtime.chip()
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
            "devices": runtime.description,
            "chip": chip.name if chip is not None else None,
            "mesh": str(runtime.mesh),
            "processes": runtime.process_count,
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
        },
        "plan": {
            "stage": stage_name,
            "first_step": state.step,
            "steps": plan.total,
            "steps_per_epoch": plan.per_epoch,
            "global_batch": plan.global_batch,
            "images": plan.total * plan.global_batch,
            "parameters": trained,
            "discriminator_parameters": disc or None,
            "frozen_parameters": _count(stage.frozen) - _count_shared(stage),
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "flops_per_image": {str(phase): count for phase, count in flops.items()},
        },
    }


def note_start(folder: Path, facts: Mapping[str, Any]) -> None:
    """Append a start to the results folder's list; raises ``OSError``."""
    line = {"started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **facts}
    with (folder / ENVIRONMENT_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@functools.cache
def git_version() -> str | None:
    """The commit the package is run from, with ``-dirty`` where files were changed since; None
    where it is no checkout.
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


def _count_shared(stage: Stage) -> int:
    """Parameters of what is trained that ``stage.frozen`` contains."""
    own = {id(p) for m in (stage.model, stage.disc) if m is not None for p in m.parameters()}
    return sum(p.numel() for p in stage.frozen.parameters() if id(p) in own)
