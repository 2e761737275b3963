"""Metrics: collect them from every step, and log them to console, file and wandb."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rae_xla.runtime import Backend
from rae_xla.train.callbacks.base import Callback
from rae_xla.train.metrics_window import DeviceMetrics, WindowSummary
from rae_xla.train.run_info import append_run_info, describe_run
from rae_xla.train.tracking.tracker import Tracker

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

logger = logging.getLogger(__name__)


HOST_SHARE = 0.8
"""Share of a step that the host may need to launch it before a warning is logged."""


def describe_slow_host(summary: WindowSummary, backend: Backend) -> str | None:
    """Return a warning if the devices of a run wait for its host, else None.

    Without an accelerator the host is the device, and launching a step may wait for the one before.
    """
    if backend.on_cpu:
        return None
    host, step = (summary.metrics.get(f"perf/{name}_time", 0.0) for name in ("host", "step"))
    if not step or host < HOST_SHARE * step:
        return None
    remedy = (
        "runtime.replay=true and runtime.scan=true"
        if backend.name == "xla"
        else ("runtime.compile=true")
    )
    return (
        f"step {summary.step}: the devices wait for the host, which needs {1e3 * host:.0f} of "
        f"{1e3 * step:.0f} ms to launch a step; set {remedy}, or use more images per step"
    )


class MetricsCallback(Callback):
    """Opens ``trainer.tracker`` and logs a line of metrics every ``training.log_every`` steps.

    A line is logged one step late, when its values have arrived without stalling the devices.
    """

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._warned_of_host = False

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the tracker and describe the run."""
        run, state, cadence = trainer.run, trainer.state, trainer.cadence
        backend = run.backend
        info = None
        if run.is_main_process:
            info = describe_run(
                run.task_name, trainer.task, state, cadence, backend, trainer.flops_per_image
            )
            append_run_info(run.folder, info)
        self._tracker = trainer.tracker = Tracker(
            run.folder,
            run.config,
            start=state.step,
            total=cadence.total,
            is_main=run.is_main_process,
            run_info=info,
        )
        resumed = f", resuming from {trainer.start.checkpoint}" if trainer.start.checkpoint else ""
        logger.info(
            "%s on %s: %d steps of %d images, %d per epoch, starting at step %d%s",
            run.task_name,
            backend.description,
            cadence.total,
            cadence.global_batch,
            cadence.per_epoch,
            state.step,
            resumed,
        )
        if len(run.data.sources) > 1:
            logger.info("%s", run.data.describe_shares(cadence.global_batch))
        if backend.accelerator() is not None and not trainer.flops_per_image:
            logger.warning("perf/mfu is not logged: the FLOPs of a step could not be counted")

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Add the metrics of a step, log the window that ended a step ago, and end one if due."""
        step, window = trainer.state.step, trainer.window
        window.add(metrics)
        trainer.log_window()
        trainer.tracker.advance()
        if trainer.cadence.is_due(trainer.cadence.log_every, step):
            scalars = {f"opt/{k}": v.item() for k, v in trainer.task.inputs(step - 1).items()}
            scalars["data/bad_samples"] = trainer.bad_samples.count
            window.close(step, scalars | trainer.saver.take_metrics())

    def on_log(self, trainer: Trainer, summary: WindowSummary) -> None:
        """Warn once if the devices wait for the host."""
        warning = describe_slow_host(summary, trainer.run.backend)
        if warning is not None and not self._warned_of_host:
            logger.warning("%s", warning)
            self._warned_of_host = True

    def close(self, error: BaseException | None) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._tracker.close(error)
