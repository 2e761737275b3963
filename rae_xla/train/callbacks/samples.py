"""Samples: an image of what the model can do, at the start and at intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rae_xla.train.callbacks.base import Callback
from rae_xla.train.callbacks.watchdog import PREVIEW
from rae_xla.train.metrics_window import DeviceMetrics

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer


class SamplesCallback(Callback):
    """Saves ``Task.preview`` to ``samples/`` every ``training.sample_every`` steps (0: never)."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Save what the untrained model generates."""
        if trainer.state.step == 0 and trainer.cadence.sample_every > 0:
            self._save(trainer)

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Save a preview if it is due."""
        every = trainer.cadence.sample_every
        if every > 0 and trainer.cadence.is_due(every, trainer.state.step):
            trainer.run.watchdog.begin(PREVIEW, trainer.state.step)
            with trainer.window.pause():
                self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        preview = trainer.task.preview(trainer.state)
        if preview is not None:
            name = trainer.run.task_name
            trainer.tracker.image(trainer.state.step, name, preview.image, preview.caption)
