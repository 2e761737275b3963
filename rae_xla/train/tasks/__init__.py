"""Tasks: the kinds of training, by the name that ``rae-xla train`` takes."""

from __future__ import annotations

from rae_xla.train.tasks.autoencoder import AutoencoderTask
from rae_xla.train.tasks.base import LossTask, Preview, Task
from rae_xla.train.tasks.diffusion import DiffusionTask
from rae_xla.train.tasks.text_to_image import TextToImageTask

__all__ = [
    "TASKS",
    "AutoencoderTask",
    "DiffusionTask",
    "LossTask",
    "Preview",
    "Task",
    "TextToImageTask",
]

TASKS: dict[str, type[Task]] = {
    "stage1": AutoencoderTask,
    "stage2": DiffusionTask,
    "t2i": TextToImageTask,
}
"""Add an entry to train another task: see docs/extending.md."""
