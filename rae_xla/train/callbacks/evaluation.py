"""Evaluation: quality metrics of the model, at intervals."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rae_xla.train.callbacks.base import Callback
from rae_xla.train.callbacks.watchdog import EVALUATION
from rae_xla.train.metrics_window import DeviceMetrics

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer


class EvaluationCallback(Callback):
    """Logs ``Task.evaluate`` every ``eval.eval_interval`` steps and at the end."""

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Evaluate if it is due."""
        step = trainer.state.step
        kind = trainer.cadence.evaluation(step)
        if kind is None:
            return
        report_progress = partial(trainer.run.watchdog.begin, EVALUATION, step)
        report_progress()
        with trainer.window.pause():
            lite = kind == "lite"
            if values := trainer.task.evaluate(trainer.state, report_progress, lite=lite):
                trainer.tracker.log(step, values)
