"""Section ``parity``: a tiny model, compared with numbers that were recorded on a CPU in float32.

The model has the same weights on every machine (``sample.tiny_model``), and every random number of
the step and of the sampler is a function of the seed, so only rounding differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import load_config
from rae_xla.runtime import Backend
from rae_xla.sample.sampler import ImageSampler
from rae_xla.tools.first_run.settings import FirstRun
from rae_xla.train.tasks.diffusion import DiffusionTask

IMAGES, STEPS = 64, 5
"""Images per step (divisible by the usual numbers of devices), and steps."""

LOSSES = (
    12.058775901794434,
    10.233630180358887,
    9.0908203125,
    8.291435241699219,
    7.291913986206055,
)
"""Loss of every step, on a CPU in float32, with torch 2.9.1."""

PATCH = slice(8, 16)
"""Rows and columns of the pixels that are compared."""

PIXELS = (
    109.708333,
    112.567708,
    112.515625,
    112.328125,
    113.984375,
    111.708333,
    113.364583,
    111.953125,
)
"""Mean of those pixels in the first samples, from 0 to 255, on a CPU in float32."""

TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Largest relative difference of a loss. TF32, which GPUs do not use here, would reach 1e-3."""

PIXEL_TOLERANCE = {"fp32": 0.5, "bf16": 1.0}
"""Largest difference of a mean pixel."""


def overrides(run: FirstRun) -> list[str]:
    """Return the settings of the tiny model's run."""
    return [
        f"training.global_batch_size={IMAGES}",
        "training.optimizer.lr=1.0e-3",
        "training.global_seed=0",
        "data.image_size=64",
        "sampler.params.num_steps=5",
        *run.runtime,
    ]


def compare(run: FirstRun, precision: str, backend: Backend) -> dict[str, Any]:
    """Train and sample the tiny model, and compare the numbers with the recorded ones."""
    return judge(precision, *compute(run, backend))


def judge(precision: str, losses: Sequence[float], pixels: Sequence[float]) -> dict[str, Any]:
    """Compare losses and pixels with the recorded ones.

    Args:
        precision: ``fp32`` or ``bf16``; the recorded numbers are in fp32.
        losses: of every step.
        pixels: mean of the compared pixels in each sample.
    """
    loss_difference = max(abs(a - b) / abs(b) for a, b in zip(losses, LOSSES, strict=True))
    pixel_difference = max(abs(a - b) for a, b in zip(pixels, PIXELS, strict=True))
    return {
        "precision": precision,
        "losses": list(losses),
        "largest_relative_difference": loss_difference,
        "pixels": list(pixels),
        "largest_pixel_difference": pixel_difference,
        "passed": loss_difference <= TOLERANCE[precision]
        and pixel_difference <= PIXEL_TOLERANCE[precision],
    }


def compute(run: FirstRun, backend: Backend) -> tuple[list[float], list[float]]:
    """Return the losses of the steps, and the mean pixel of the first samples."""
    config = load_config(run.tiny_model, overrides=overrides(run))
    task = DiffusionTask(config, backend, None, 1000)
    state = make_state(task.model, backend)
    backend.place(task.frozen)
    train_step = task.make_step(task.phase(0), state)
    step = backend.compile(train_step)
    own = IMAGES // backend.process_count
    rows = torch.arange(IMAGES)[own * backend.process_index :][:own]
    losses = []
    for number in range(STEPS):
        image = (torch.arange(3 * 64 * 64) * 37 + 101 * rows[:, None]) % 256
        batch = {
            "image": image.reshape(own, 3, 64, 64).to(torch.uint8),
            "label": rows % 1000,
            "row": rows.to(torch.int32),
            "step": torch.tensor(number, dtype=torch.int32),
        }
        metrics = step(backend.shard_batch(batch | task.inputs(number)))
        [values] = backend.fetch([metrics])
        losses.append(float(values[train_step.metric_names.index("train/loss")]))
    sampled = replace(config, guidance=replace(config.guidance, scale=1.5))
    sampler = ImageSampler(sampled, backend, task.frozen, state.ema)  # type: ignore[arg-type]
    images = sampler(0, torch.arange(8, dtype=torch.int32), torch.arange(8))
    return losses, [float(image[PATCH, PATCH].mean()) for image in images]
