"""Section ``sampling``: images per second of a real-size model in every mode of sampling."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rae_xla.config import RunConfig
from rae_xla.runtime import Backend
from rae_xla.sample.sampler import ImageSampler
from rae_xla.tools.first_run.random_task import build_random_task
from rae_xla.tools.first_run.settings import FirstRun
from rae_xla.tools.first_run.steps import step_config


@dataclass(frozen=True)
class Mode:
    """A mode of sampling.

    Attributes:
        kind: solver of an ODE or of an SDE.
        method: its method.
        steps: solver steps.
        guidance: kind of guidance.
        scale: of the guidance; 1 for none.
    """

    kind: Literal["ODE", "SDE"]
    method: str
    steps: int
    guidance: Literal["cfg", "autoguidance"] = "cfg"
    scale: float = 1.0


MODES = {
    "ODE euler, no guidance": Mode("ODE", "euler", 50),
    "ODE euler, classifier-free guidance": Mode("ODE", "euler", 50, "cfg", 1.5),
    "ODE euler, autoguidance": Mode("ODE", "euler", 50, "autoguidance", 1.5),
    "ODE heun2, no guidance": Mode("ODE", "heun2", 25),
    "SDE euler, no guidance": Mode("SDE", "euler", 50),
}

SMOKE_STEPS = 2


def measure_sampling(run: FirstRun, rows: int, backend: Backend) -> dict[str, Any]:
    """Time every mode of sampling with random weights.

    Args:
        run: the first run.
        rows: images per device.
        backend: that computes.

    Returns:
        For each mode seconds of the first batch (with compilation) and of a later one, and
        images/s.
    """
    images = rows * backend.mesh.batch_shards
    config = step_config(run, "stage2", images)
    task = build_random_task(config, "stage2", backend)
    guide = build_random_task(config, "stage2", backend).model.eval()
    for module in (task.model, task.frozen, guide):
        backend.place(module.eval().requires_grad_(False))
    found = {}
    for name, mode in MODES.items():
        configured = _configured(config, mode, run.smoke)
        with_guide = guide if mode.guidance == "autoguidance" else None
        sampler = ImageSampler(configured, backend, task.frozen, task.model, with_guide)  # type: ignore[arg-type]
        first, second = (_seconds(sampler, images) for _ in range(2))
        found[name] = {
            "solver_steps": configured.sampler.params.num_steps,
            "first_batch_s": first,
            "batch_s": second,
            "images_per_s": images / second,
        }
    return {"images": images, "modes": found, "description": backend.description}


def _configured(config: RunConfig, mode: Mode, smoke: bool) -> RunConfig:
    count = SMOKE_STEPS if smoke else mode.steps
    params = replace(config.sampler.params, sampling_method=mode.method, num_steps=count)
    return replace(
        config,
        sampler=replace(config.sampler, mode=mode.kind, params=params),
        guidance=replace(config.guidance, method=mode.guidance, scale=mode.scale),
    )


def _seconds(sampler: ImageSampler, images: int) -> float:
    """Return the time of one batch, until its pixels are on the host."""
    indices, labels = torch.arange(images, dtype=torch.int32), torch.zeros(images).long()
    start = time.perf_counter()
    sampler(0, indices, labels)
    return time.perf_counter() - start
