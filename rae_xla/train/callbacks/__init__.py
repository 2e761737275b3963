"""Callbacks: what happens around the steps of a training, in the order of ``default_callbacks``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rae_xla.train.callbacks.base import Callback, CallbackList
from rae_xla.train.callbacks.checkpointing import CheckpointingCallback
from rae_xla.train.callbacks.evaluation import EvaluationCallback
from rae_xla.train.callbacks.metrics import MetricsCallback
from rae_xla.train.callbacks.preemption import PreemptionCallback
from rae_xla.train.callbacks.profiling import ProfilingCallback
from rae_xla.train.callbacks.rollback import RollbackCallback
from rae_xla.train.callbacks.samples import SamplesCallback
from rae_xla.train.callbacks.watchdog import WatchdogCallback

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

__all__ = ["Callback", "CallbackList", "default_callbacks"]


def default_callbacks(trainer: Trainer, extra: Sequence[Callback] = ()) -> CallbackList:
    """Return the callbacks of a training in the order in which their hooks run.

    1. metrics: opens the tracker that the others use; logs the previous window.
    2. watchdog: reports a hang to the tracker.
    3. rollback: ends the attempt if too many steps in a row were skipped, before anything is
       computed or saved from their state.
    4. profiling: starts before a step and ends after it.
    5. samples and 6. checkpointing: a preview that fails leaves the checkpoint to the next start.
    7. evaluation: after the checkpoint, so that a failing evaluation loses no step.
    8. ``extra``, the caller's own.
    9. preemption: last, so that whatever is due at a step is done before the run stops.

    Args:
        trainer: of the callbacks.
        extra: further callbacks.
    """
    run = trainer.run
    rollback = RollbackCallback()
    return CallbackList(
        [
            MetricsCallback(),
            WatchdogCallback(run.watchdog),
            rollback,
            ProfilingCallback(run.backend, run.folder, run.config.training.profile_steps),
            SamplesCallback(),
            CheckpointingCallback(trainer.saver, rollback),
            EvaluationCallback(),
            *extra,
            PreemptionCallback(run.stop_request, run.backend),
        ]
    )
