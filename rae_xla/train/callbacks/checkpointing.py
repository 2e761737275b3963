"""Checkpointing: save the state at intervals, after a failed save, on a stop and at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rae_xla.errors import UserError
from rae_xla.train.callbacks.base import Callback
from rae_xla.train.callbacks.preemption import SAVE
from rae_xla.train.callbacks.rollback import RollbackCallback
from rae_xla.train.callbacks.watchdog import CHECKPOINT
from rae_xla.train.metrics_window import DeviceMetrics

if TYPE_CHECKING:
    from rae_xla.checkpoint.saver import Saver
    from rae_xla.train.trainer import Trainer

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 20.0
"""Seconds for which the checkpoint of a stopped run is retried: a preempted machine has 30."""


class CheckpointingCallback(Callback):
    """Saves every ``checkpoint.every_steps`` steps, without waiting for the files.

    Nothing is saved right after skipped steps: a rollback must not find their state.
    """

    def __init__(self, saver: Saver, rollback: RollbackCallback) -> None:
        self._saver, self._rollback = saver, rollback

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Save if it is due, or if a failed save is to be retried."""
        step, total = trainer.state.step, trainer.cadence.total
        if SAVE in trainer.agreed or trainer.cadence.is_due(trainer.cadence.checkpoint_every, step):
            trainer.run.watchdog.begin(CHECKPOINT, step)
            with trainer.window.pause():
                # Metrics first, so that a kill after the save cannot lose their line. The last
                # line waits for the metrics of the last checkpoint.
                if step < total:
                    trainer.log_window()
                skipped = trainer.window.skipped_now()
                self._rollback.check(trainer, step, skipped)
                if skipped and step < total:
                    logger.warning(
                        "step %d: no checkpoint, since the last %d steps were skipped",
                        step,
                        skipped,
                    )
                else:
                    self._saver.start(step)
        if self._saver.retry_due:
            trainer.requests.add(SAVE)

    def on_train_end(self, trainer: Trainer) -> None:
        """Save the last state, then log the last window.

        Raises:
            UserError: the run is complete and its last checkpoint cannot be written.
        """
        if trainer.is_stopped:
            self._save_stopped(trainer)
            return
        step, retry_seconds = trainer.state.step, trainer.run.config.checkpoint.retry_seconds
        trainer.run.watchdog.begin(CHECKPOINT, step, retry_seconds)
        saved = self._saver.finish(step, retry_seconds)
        # The last line waits for the last checkpoint, whose metrics it includes.
        trainer.log_window(self._saver.take_metrics())
        if not saved:
            resume_from = self._saver.last or trainer.start.checkpoint or "its start"
            raise UserError(
                f"the checkpoint of the last step, {step}, could not be written: "
                f"{self._saver.failure}. Free some space or restore the access to the storage, and "
                f"start the run again: it resumes from {resume_from}"
            ) from self._saver.error

    def _save_stopped(self, trainer: Trainer) -> None:
        step = trainer.state.step
        trainer.run.watchdog.begin(CHECKPOINT, step)
        trainer.tracker.mark_preempting(step, trainer.stop_reason or "")
        with trainer.window.pause():
            trainer.log_window()
            if step > trainer.start.step and not trainer.window.skipped_now():
                self._saver.finish(step, STOP_TIMEOUT)
        logger.info("step %d: stopped (%s)", step, trainer.stop_reason)

    def close(self, error: BaseException | None) -> None:
        """Wait for the save in progress."""
        self._saver.wait()
