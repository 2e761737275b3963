"""The training loop, the same for both stages and every backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from rae_xla.config import RunConfig, check_mesh
from rae_xla.data.faults import BadSamples
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import Checkpoint
from rae_xla.runtime import Batch, Runtime
from rae_xla.train.batches import open_stream, step_batches
from rae_xla.train.checkpoint import (
    check_shared,
    checkpoints_folder,
    choose_checkpoint,
    restore,
    run_facts,
    state_tensors,
)
from rae_xla.train.environment import describe_start, note_start
from rae_xla.train.flops import phase_flops
from rae_xla.train.folder import bad_samples_file
from rae_xla.train.plan import make_plan
from rae_xla.train.profiling import Profiler
from rae_xla.train.rollback import Beginning, SkippedStepsError, go_back
from rae_xla.train.same_run import check_hosts, checked_rows
from rae_xla.train.saver import Gathered, Saver
from rae_xla.train.stage import Stage
from rae_xla.train.stage1 import Stage1
from rae_xla.train.stage2 import Stage2
from rae_xla.train.state import TrainState
from rae_xla.train.step import Step
from rae_xla.train.survival import StopRequest, agreed
from rae_xla.train.tracking import Tracker
from rae_xla.train.watchdog import (
    DATA,
    EVALUATING,
    FIRST_STEP,
    HOSTS,
    PICTURES,
    SAVING,
    STARTING,
    STEP,
    Watchdog,
)
from rae_xla.train.window import Windows

STAGES: dict[str, Callable[[RunConfig, Runtime, Mixture | None, int], Stage]] = {
    "stage1": Stage1,
    "stage2": Stage2,
}


STOPPING_PATIENCE = 20.0
"""Seconds for which the checkpoint of a run that is told to stop is tried again: a machine that is
preempted is given 30.
"""


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        checkpoint: the newest one; None where there is none.
        stopped: whether it was told to stop before its end.
    """

    checkpoint: Checkpoint | None
    stopped: bool = False


def train(
    config: RunConfig,
    runtime: Runtime,
    data: Mixture,
    stage_name: str,
    folder: Path,
) -> Outcome:
    """Train a stage to its end, or until the process is told to stop, from where it stands.

    Args:
        config: of the run.
        runtime: where it computes.
        data: the training shards.
        stage_name: one of ``STAGES``.
        folder: the results folder.

    Raises:
        UserError: when the configuration, the data and the devices do not fit each other, when
            steps keep giving numbers that are not finite, or when the last checkpoint cannot be
            written.
    """
    place = checkpoints_folder(config, folder)
    check_shared(place, runtime)
    found = choose_checkpoint(place, runtime)
    beginning = Beginning(found, found.step if found else 0)
    timeout = config.training.hang_timeout
    with StopRequest() as stop, Watchdog(timeout, folder, runtime.process_index) as watchdog:
        while True:
            watchdog.begin(STARTING, beginning.step)
            try:
                return _train_from(
                    beginning, place, config, runtime, data, stage_name, folder, stop, watchdog
                )
            except SkippedStepsError as error:
                skips = SkippedStepsError(error.step, error.skipped, error.rollbacks)
            # Out here, without the traceback: it would keep the models that are built anew.
            beginning = go_back(place, runtime, stage_name, skips, config.training.max_rollbacks)


def _train_from(
    beginning: Beginning,
    place: str,
    config: RunConfig,
    runtime: Runtime,
    data: Mixture,
    stage_name: str,
    folder: Path,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Outcome:
    batch = check_mesh(config, runtime.mesh.batch_parts).global_batch_size
    bad = BadSamples(
        folder / bad_samples_file(runtime.process_index),
        start=beginning.step,
        max_fraction=config.data.max_bad_samples,
        per_epoch=len(data) // runtime.process_count,
    )
    stream = open_stream(config, runtime, data, bad, stage=stage_name, global_batch=batch)
    plan = make_plan(config, stream.steps_per_epoch, batch)
    stage = STAGES[stage_name](config, runtime, data, stream.steps_per_epoch)
    flops: dict[Hashable, float] = {}
    if runtime.chip() is not None:  # of no use without a peak, and it takes seconds
        parts, size = config.training.grad_accum_steps, config.data.image_size
        with suppress(Exception):  # a figure of the log is not worth a run
            flops = phase_flops(stage, beginning.step, plan.total, size, parts)
    state = restore(stage, runtime, beginning.checkpoint)
    state.step = beginning.step
    check_hosts(runtime, config, data, stream, state.step)
    runtime.place(stage.frozen)
    if state.step >= plan.total:
        print(f"{folder}: complete, {state.step} steps done")
        return Outcome(beginning.checkpoint)

    def gather() -> Gathered:
        facts = run_facts(config, runtime, stage, state.step, data.fingerprint)
        return state_tensors(stage, state), facts

    steps = _Steps(stage, state, runtime)
    windows = Windows(plan, runtime)
    host_batches = windows.waiting(step_batches(stream, stage.inputs, state.step, plan.total))
    feed = checked_rows(runtime, map(runtime.put, host_batches), batch)
    speaks = runtime.process_index == 0
    about = None
    if speaks:
        about = describe_start(stage_name, stage, state, plan, runtime, flops)
        note_start(folder, about)
    with (
        Tracker(
            folder, config, start=state.step, total=plan.total, speaks=speaks, facts=about
        ) as tracker,
        Saver(place, runtime, config.checkpoint, tracker.say, gather) as saver,
        Profiler(
            runtime, folder, config.training.profile_steps, windows.pause, tracker.say
        ) as profiler,
    ):
        if speaks:
            bad.say = tracker.say
        watchdog.tell = tracker.stalled
        begins_at = f" of {beginning.checkpoint}" if beginning.checkpoint else ""
        tracker.say(
            f"{stage_name} on {runtime.description}: {plan.total} steps of {batch} images, "
            f"{plan.per_epoch} to an epoch, from step {state.step}{begins_at}"
        )
        if len(data.sources) > 1:
            tracker.say(data.shares(batch))
        if runtime.chip() is not None and not flops:
            tracker.say("perf/mfu is left out: the FLOPs of a step could not be counted")
        if state.step == 0 and plan.sample_every > 0:
            tracker.images(0, stage_name, stage.preview(state), stage.caption)
        if beginning.rollbacks:
            tracker.say(
                f"step {state.step}: going on with the state of {beginning.checkpoint}; the steps "
                "since then count as skipped"
            )
            tracker.log(state.step, {"train/rollbacks": beginning.rollbacks})
            tracker.alert(
                "Went back to a checkpoint", f"{beginning.checkpoint}, from step {state.step}"
            )
        stop_if = partial(_stop_if, config.training.max_skipped, beginning, saver)
        while state.step < plan.total:
            watchdog.begin(HOSTS, state.step)
            asked = {"stop"} if stop.reason else set()
            words = agreed(runtime, state.step, asked | ({"save"} if saver.retry_due else set()))
            if "stop" in words:
                watchdog.begin(SAVING, state.step)
                tracker.stopping(state.step, stop.reason or "as another process")
                with windows.pause():
                    if (window := windows.take()) is not None:
                        tracker.log(window.step, window.figures)
                    if state.step > beginning.step and not windows.skipped_up_to_now():
                        saver.finish(state.step, STOPPING_PATIENCE)
                tracker.say(f"step {state.step}: stopped, {stop.reason or 'as another process'}")
                return Outcome(saver.last or beginning.checkpoint, stopped=True)
            if phase := steps.begins(state.step):
                tracker.say(f"step {state.step}: {phase}")
                tracker.say("its first step takes longer, some minutes where it is compiled")
            profiler.before(state.step + 1)
            watchdog.begin(DATA, state.step)
            inputs = next(feed)
            watchdog.begin(FIRST_STEP if phase else STEP, state.step)
            windows.add(*steps.take(state.step, inputs), flops.get(stage.phase(state.step)))
            for warning in runtime.warnings() if phase else ():
                tracker.say(f"step {state.step}: {warning}")
            state.step += 1
            if (window := windows.take()) is not None:  # a step ago: its figures are there by now
                tracker.log(window.step, window.figures)
                stop_if(window.step, window.skipped_in_a_row)
            tracker.advance()
            if plan.due(plan.log_every, state.step):
                rates = stage.inputs(state.step - 1)
                scalars = {f"opt/{k}": v.item() for k, v in rates.items()}
                scalars |= {"data/bad_samples": bad.count} | saver.take_figures()
                windows.close(state.step, scalars)
            if plan.due(plan.sample_every, state.step) and plan.sample_every > 0:
                watchdog.begin(PICTURES, state.step)
                with windows.pause():
                    tracker.images(state.step, stage_name, stage.preview(state), stage.caption)
            if "save" in words or plan.due(plan.checkpoint_every, state.step):
                watchdog.begin(SAVING, state.step)
                with windows.pause():
                    # Before there is a checkpoint, so that no kill loses its line; the last one
                    # waits for the figures of the last checkpoint.
                    if state.step < plan.total and (window := windows.take()) is not None:
                        tracker.log(window.step, window.figures)
                        stop_if(window.step, window.skipped_in_a_row)
                    skipped = windows.skipped_up_to_now()
                    stop_if(state.step, skipped)
                    if skipped and state.step < plan.total:
                        tracker.say(f"step {state.step}: no checkpoint, {skipped} steps skipped")
                    else:
                        saver.start(state.step)
            if kind := plan.evaluation(state.step):
                evaluating = partial(watchdog.begin, EVALUATING, state.step)
                evaluating()
                with windows.pause():
                    if figures := stage.evaluate(state, evaluating, lite=kind == "lite"):
                        tracker.log(state.step, figures)
        watchdog.begin(SAVING, state.step, config.checkpoint.retry_seconds)
        saved = saver.finish(state.step, config.checkpoint.retry_seconds)
        if (window := windows.take()) is not None:
            tracker.log(window.step, window.figures | saver.take_figures())
        if not saved:
            raise UserError(
                f"the checkpoint of step {state.step}, the last, could not be written: "
                f"{saver.failure}. Make room or mend the way to the storage, and start the run "
                f"again: it goes on from {saver.last or beginning.checkpoint or 'its start'}"
            )
        return Outcome(saver.last)


class _Steps:
    """The compiled step of each phase, made when the phase begins."""

    def __init__(self, stage: Stage, state: TrainState, runtime: Runtime) -> None:
        self._stage, self._state, self._runtime = stage, state, runtime
        self._compiled: dict[Hashable, tuple[Step, Callable[[Batch], Tensor]]] = {}
        self._phase: Hashable | None = None

    def take(self, number: int, batch: Batch) -> tuple[Step, Tensor]:
        """Take a step; returns what was taken and its figures, on the devices."""
        phase = self._stage.phase(number)
        if phase not in self._compiled:
            step = self._stage.make_step(phase, self._state)
            self._compiled[phase] = step, self._runtime.compile(step)
        step, compiled = self._compiled[phase]
        return step, compiled(batch)

    def begins(self, number: int) -> Hashable | None:
        """The phase of a step, if it is another than that of the step before."""
        before, self._phase = self._phase, self._stage.phase(number)
        return None if self._phase == before else self._phase


def _stop_if(max_skipped: int, beginning: Beginning, saver: Saver, step: int, skipped: int) -> None:
    """End the attempt if its last ``skipped`` steps, up to ``step``, gave nothing."""
    if skipped >= max_skipped:
        rollbacks = 0 if saver.last is not None else beginning.rollbacks
        raise SkippedStepsError(step, skipped, rollbacks)
