"""Rollback: end this attempt when too many steps in a row were skipped."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rae_xla.train.callbacks.base import Callback
from rae_xla.train.metrics_window import WindowSummary
from rae_xla.train.rollback import SkippedStepsError

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

logger = logging.getLogger(__name__)


class RollbackCallback(Callback):
    """Raises ``SkippedStepsError`` after ``training.max_skipped`` steps in a row were skipped.

    ``train`` handles it: it starts a new ``Trainer`` from an earlier checkpoint.
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """Record that this attempt started with a rollback."""
        start, step = trainer.start, trainer.state.step
        if not start.rollbacks:
            return
        logger.warning(
            "step %d: rolled back to the state of %s; the steps since then count as skipped",
            step,
            start.checkpoint,
        )
        trainer.tracker.log(step, {"train/rollbacks": start.rollbacks})
        trainer.tracker.alert("Rolled back to a checkpoint", f"{start.checkpoint}, at step {step}")

    def on_log(self, trainer: Trainer, summary: WindowSummary) -> None:
        """Check the steps of the window, unless the training ends with it."""
        if trainer.stop_reason is None and summary.step < trainer.cadence.total:
            self.check(trainer, summary.step, summary.skipped_in_a_row)

    def check(self, trainer: Trainer, step: int, skipped: int) -> None:
        """Raise if the last ``skipped`` steps up to ``step`` were skipped and are too many."""
        if skipped >= trainer.run.config.training.max_skipped:
            # A checkpoint of this attempt is progress: rollbacks are counted from zero again.
            rollbacks = 0 if trainer.saver.last is not None else trainer.start.rollbacks
            raise SkippedStepsError(step, skipped, rollbacks)
