"""The trainer: the loop, the same for every task and every backend."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rae_xla.checkpoint.manager import Checkpoint, checkpoints_folder
from rae_xla.checkpoint.provenance import run_facts
from rae_xla.checkpoint.resume import check_shared, choose_checkpoint
from rae_xla.checkpoint.saver import CheckpointContents, Saver
from rae_xla.checkpoint.train_state import TrainState, restore, state_tensors
from rae_xla.config import RunConfig, split_batch
from rae_xla.data.bad_samples import BadSampleLog
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.runtime import Backend, Batch
from rae_xla.train.batches import host_batches, open_loader
from rae_xla.train.cadence import make_cadence
from rae_xla.train.callbacks import Callback, default_callbacks
from rae_xla.train.callbacks.preemption import StopRequest
from rae_xla.train.callbacks.results import ResultsCallback
from rae_xla.train.callbacks.watchdog import DATA, FIRST_STEP, STARTING, STEP, Watchdog
from rae_xla.train.consistency import check_hosts, checked_rows
from rae_xla.train.flops import phase_flops
from rae_xla.train.metrics_window import DeviceMetrics, Metrics, MetricsWindow
from rae_xla.train.results_folder import (
    ResultsFolder,
    bad_samples_file,
    claim_folder,
    open_results,
)
from rae_xla.train.rollback import SkippedStepsError, StartPoint, roll_back
from rae_xla.train.tasks import TASKS, Task
from rae_xla.train.tracking.tracker import Tracker
from rae_xla.train.train_step import TrainStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        checkpoint: the newest one; None if there is none.
        stopped: whether it was stopped before its last step.
    """

    checkpoint: Checkpoint | None
    stopped: bool = False


@dataclass(frozen=True)
class RunContext:
    """What stays the same over all attempts of a run.

    Attributes:
        config: of the run.
        backend: holds the state and computes.
        data: the training shards.
        task_name: a key of ``TASKS``.
        results: the results folder.
        stop_request: whether the run is to stop, and why.
        watchdog: monitors the current activity of the run.
    """

    config: RunConfig
    backend: Backend
    data: Mixture
    task_name: str
    results: ResultsFolder
    stop_request: StopRequest
    watchdog: Watchdog

    @property
    def folder(self) -> Path:
        """Where this process writes the files of the run; see ``ResultsFolder.local``."""
        return self.results.local

    @property
    def checkpoint_folder(self) -> str:
        """Where the checkpoints are."""
        return checkpoints_folder(self.config, self.results.location)

    @property
    def is_main_process(self) -> bool:
        """Whether this process logs and writes the files of the run."""
        return self.backend.process_index == 0


class Trainer:
    """Trains a task from a start point to the last step.

    ``fit`` is the loop. What a step computes is the work of the task (``train.tasks``), what
    happens around a step that of the callbacks (``train.callbacks``).

    Args:
        run: the run.
        start: the checkpoint and the step to start from.
        callbacks: called in addition to ``default_callbacks``.

    Attributes:
        task: what is trained.
        state: parameters, moving average, optimizer state and step, on the devices.
        batches: the batches of the remaining steps, on the devices.
        callbacks: all callbacks, in order.
        cadence: the length of the run and its intervals.
        window: the metrics since the last log line.
        saver: writes checkpoints.
        tracker: writes metrics and images; available from ``on_train_start`` on.
        flops_per_image: by phase; empty if they are not needed or could not be counted.
        requests: what this process requests of all processes after this step.
        agreed: what the processes agreed to do after the previous step.
        stop_reason: why the run is to stop; None if it is not.

    Raises:
        UserError: configuration, data, files and devices do not fit each other.
    """

    tracker: Tracker

    def __init__(
        self, run: RunContext, start: StartPoint, callbacks: Sequence[Callback] = ()
    ) -> None:
        config, backend = run.config, run.backend
        self.run, self.start = run, start
        self.requests: set[str] = set()
        self.agreed: set[str] = set()
        self.stop_reason: str | None = None
        global_batch = split_batch(config, backend.mesh.batch_shards).global_batch_size
        self.bad_samples = BadSampleLog(
            run.folder / bad_samples_file(backend.process_index),
            start=start.step,
            max_fraction=config.data.max_bad_samples,
            per_epoch=len(run.data) // backend.process_count,
        )
        task_class = TASKS[run.task_name]
        loader = open_loader(
            config,
            backend,
            run.data,
            self.bad_samples,
            crop=task_class.crop,
            flip=task_class.flip,
            global_batch=global_batch,
            row_arrays=task_class.row_arrays(config, run.data),
        )
        self.cadence = make_cadence(config, loader.steps_per_epoch, global_batch)
        self.task: Task = task_class(config, backend, run.data, loader.steps_per_epoch)
        self.flops_per_image = self._count_flops()  # before the task is moved to the devices
        self.state = restore(self.task, backend, start.checkpoint, start.step)
        self.state.step = start.step
        check_hosts(backend, config, run.data, loader, start.step)
        backend.place(self.task.frozen)
        self.window = MetricsWindow(self.cadence, backend)
        self.batches = self._device_batches(loader)
        posthoc = config.training.posthoc_ema
        self.saver = Saver(
            run.checkpoint_folder,
            backend,
            config.checkpoint,
            self._checkpoint_contents,
            keep_averages=posthoc.keep if posthoc.widths else 0,
        )
        self.callbacks = default_callbacks(self, callbacks)
        self._steps = _CompiledSteps(self.task, self.state, backend)

    def fit(self) -> TrainResult:
        """Train until the last step, or until the run is stopped."""
        with contextlib.closing(self.batches), self.callbacks.closing():
            self.callbacks.on_train_start(self)
            while self.state.step < self.cadence.total and self.stop_reason is None:
                self.callbacks.on_step_start(self)
                metrics = self.train_step(next(self.batches))
                self.state.step += 1
                self.callbacks.on_step_end(self, metrics)
            self.callbacks.on_train_end(self)
        return TrainResult(self.saver.last or self.start.checkpoint, self.is_stopped)

    def train_step(self, batch: Batch) -> DeviceMetrics:
        """Dispatch one step; the devices compute it while the host prepares the next one."""
        step = self.state.step
        phase_starts = self._steps.starts_phase(step)
        self.run.watchdog.begin(FIRST_STEP if phase_starts else STEP, step)
        if phase_starts:
            logger.info("step %d: phase %s starts", step, self.task.phase(step))
            logger.info("the first step takes longer, some minutes where it is compiled")
        train_step, values = self._steps(step, batch)
        for warning in self.run.backend.warnings() if phase_starts else ():
            logger.warning("step %d: %s", step, warning)
        return DeviceMetrics(train_step, values, self.flops_per_image.get(self.task.phase(step)))

    def stop(self, reason: str) -> None:
        """End the training after the current step and save; all processes must call this."""
        self.stop_reason = reason

    @property
    def is_stopped(self) -> bool:
        """Whether the run is to end, or ended, before its last step."""
        return self.stop_reason is not None and self.state.step < self.cadence.total

    def log_window(self, extra: Metrics | None = None) -> None:
        """Log the window that ended, if there is one, with further metrics."""
        if (summary := self.window.take()) is not None:
            self.tracker.log(summary.step, summary.metrics | (extra or {}))
            self.callbacks.on_log(self, summary)

    def _device_batches(self, loader: TrainingLoader) -> Generator[Batch, None, None]:
        backend, start = self.run.backend, self.state.step
        on_host = host_batches(loader, self.task.inputs, start, self.cadence.total)
        on_devices = map(backend.shard_batch, self.window.timed_batches(on_host))
        checked = checked_rows(backend, on_devices, self.cadence.global_batch)
        while True:
            self.run.watchdog.begin(DATA, self.state.step)
            try:
                batch = next(checked)
            except StopIteration:
                return
            yield batch

    def _checkpoint_contents(self) -> CheckpointContents:
        run = self.run
        fingerprint = run.data.fingerprint
        facts = run_facts(run.config, run.backend, self.task, self.state.step, fingerprint)
        return state_tensors(self.task, self.state), facts

    def _count_flops(self) -> dict[Hashable, float]:
        if self.run.backend.accelerator() is None:  # without a peak there is no utilisation to log
            return {}
        training, data = self.run.config.training, self.run.config.data
        try:
            return phase_flops(
                self.task,
                self.start.step,
                self.cadence.total,
                data.image_size,
                training.grad_accum_steps,
            )
        except Exception:  # a metric must not end a run
            logger.debug("the FLOPs of a step could not be counted", exc_info=True)
            return {}


class _CompiledSteps:
    """The compiled step of every phase, built when the phase starts."""

    def __init__(self, task: Task, state: TrainState, backend: Backend) -> None:
        self._task, self._state, self._backend = task, state, backend
        self._compiled: dict[Hashable, tuple[TrainStep, Callable[[Batch], Tensor]]] = {}
        self._phase: Hashable | None = None

    def __call__(self, step: int, batch: Batch) -> tuple[TrainStep, Tensor]:
        """Dispatch step number ``step``; returns the step of its phase and its metrics."""
        phase = self._task.phase(step)
        if phase not in self._compiled:
            train_step = self._task.make_step(phase, self._state)
            self._compiled[phase] = train_step, self._backend.compile(train_step)
        train_step, compiled = self._compiled[phase]
        return train_step, compiled(batch)

    def starts_phase(self, step: int) -> bool:
        """Return whether the step belongs to another phase than the previous one; call it once."""
        previous, self._phase = self._phase, self._task.phase(step)
        return self._phase != previous


def train(
    config: RunConfig,
    backend: Backend,
    data: Mixture,
    task_name: str,
    folder: str | Path,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a task to its end, or until the process is stopped, resuming from its checkpoints.

    Args:
        config: of the run.
        backend: computes; all of its processes call this.
        data: the training shards.
        task_name: a key of ``TASKS``, such as ``stage2``.
        folder: the results folder, local or ``gs://``; it is created, and locked during the run.
        callbacks: called in addition to ``default_callbacks``, again in each attempt after a
            rollback.

    Raises:
        UserError: the folder holds another run or is in use, configuration, data and devices do not
            fit each other, too many steps in a row were skipped, or the last checkpoint cannot be
            written.
    """
    if task_name not in TASKS:
        raise UserError(f"there is no task {task_name!r}: choose one of {', '.join(TASKS)}")
    timeout = config.training.hang_timeout
    with (
        open_results(folder, backend) as results,
        StopRequest() as stop_request,
        Watchdog(timeout, results.local, backend.process_index) as watchdog,
    ):
        claim_folder(results, config, data.fingerprint, data.sources[0].class_names)
        run = RunContext(config, backend, data, task_name, results, stop_request, watchdog)
        if results.upload is not None:
            callbacks = [*callbacks, ResultsCallback(results.upload)]
        check_shared(run.checkpoint_folder, backend)
        checkpoint = choose_checkpoint(run.checkpoint_folder, backend)
        start = StartPoint(checkpoint, checkpoint.step if checkpoint else 0)
        while True:
            watchdog.begin(STARTING, start.step)
            try:
                return _attempt(run, start, callbacks)
            except SkippedStepsError as error:
                skips = SkippedStepsError(error.step, error.skipped, error.rollbacks)
            # The old models must be freed before the next ones are built. Outside of the handler,
            # no traceback refers to them; some are in reference cycles.
            gc.collect()
            max_rollbacks = config.training.max_rollbacks
            weights_key = TASKS[task_name].weights_key
            start = roll_back(run.checkpoint_folder, backend, weights_key, skips, max_rollbacks)


def _attempt(run: RunContext, start: StartPoint, callbacks: Sequence[Callback]) -> TrainResult:
    trainer = Trainer(run, start, callbacks)
    if trainer.state.step >= trainer.cadence.total:
        logger.info("%s: already complete, %d steps", run.results.location, trainer.state.step)
        return TrainResult(start.checkpoint)
    return trainer.fit()
