"""The training loop, the same for both stages and every backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

from torch import Tensor

from rae_xla.config import RunConfig, check_mesh
from rae_xla.data.faults import BadSamples
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.runtime import Batch, Runtime
from rae_xla.train.batches import open_stream, step_batches
from rae_xla.train.checkpoint import (
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from rae_xla.train.folder import bad_samples_file
from rae_xla.train.plan import make_plan
from rae_xla.train.same_run import check_hosts, checked_rows
from rae_xla.train.stage import Stage
from rae_xla.train.stage1 import Stage1
from rae_xla.train.stage2 import Stage2
from rae_xla.train.state import TrainState, make_state
from rae_xla.train.step import Step
from rae_xla.train.tracking import Tracker
from rae_xla.train.window import Windows

STAGES: dict[str, Callable[[RunConfig, Runtime, Mixture, int], Stage]] = {
    "stage1": Stage1,
    "stage2": Stage2,
}


def train(
    config: RunConfig,
    runtime: Runtime,
    data: Mixture,
    stage_name: str,
    folder: Path,
) -> Path:
    """Train a stage to its end, from where the results folder stands.

    Args:
        config: of the run.
        runtime: where it computes.
        data: the training shards.
        stage_name: one of ``STAGES``.
        folder: the results folder.

    Returns:
        The last checkpoint.

    Raises:
        UserError: when the configuration, the data and the devices do not fit each other, or when
            steps keep giving numbers that are not finite.
    """
    found = list_checkpoints(folder)
    batch = check_mesh(config, runtime.mesh.size).global_batch_size
    bad = BadSamples(
        folder / bad_samples_file(runtime.process_index),
        start=checkpoint_step(found[-1]) if found else 0,
        max_fraction=config.data.max_bad_samples,
        per_epoch=len(data) // runtime.process_count,
    )
    stream = open_stream(config, runtime, data, bad, stage=stage_name, global_batch=batch)
    plan = make_plan(config, stream.steps_per_epoch, batch)
    stage = STAGES[stage_name](config, runtime, data, stream.steps_per_epoch)
    state = _restore(stage, runtime, found[-1] if found else None)
    check_hosts(runtime, config, data, stream, state.step)
    runtime.place(stage.frozen)
    if state.step >= plan.total:
        print(f"{folder}: complete, {state.step} steps done")
        return found[-1]

    steps = _Steps(stage, state, runtime)
    host_batches = step_batches(stream, stage.inputs, state.step, plan.total)
    feed = checked_rows(runtime, map(runtime.put, host_batches), batch)
    speaks = runtime.process_index == 0
    with Tracker(folder, config, start=state.step, total=plan.total, speaks=speaks) as tracker:
        if speaks:
            bad.say = tracker.say
        tracker.say(
            f"{stage_name} on {runtime.description}: {plan.total} steps of {batch} images, "
            f"{plan.per_epoch} to an epoch, from step {state.step}"
        )
        if len(data.sources) > 1:
            tracker.say(data.shares(batch))
        if state.step == 0 and plan.sample_every > 0:
            tracker.images(0, stage_name, stage.preview(state))
        windows = Windows(plan, runtime)
        stop_if = partial(_stop_if, config.training.max_skipped, folder, stage_name)
        while state.step < plan.total:
            if phase := steps.begins(state.step):
                tracker.say(f"step {state.step}: {phase}")
            with windows.waiting():
                inputs = next(feed)
            windows.add(*steps.take(state.step, inputs))
            state.step += 1
            if (window := windows.take()) is not None:  # a step ago: its figures are there by now
                tracker.log(window.step, window.figures)
                stop_if(window.step, window.skipped_in_a_row)
            tracker.advance()
            if plan.due(plan.log_every, state.step):
                rates = stage.inputs(state.step - 1)
                scalars = {f"opt/{k}": v.item() for k, v in rates.items()}
                windows.close(state.step, scalars | {"data/bad_samples": bad.count})
            if plan.due(plan.sample_every, state.step) and plan.sample_every > 0:
                with windows.pause():
                    tracker.images(state.step, stage_name, stage.preview(state))
            if plan.due(plan.checkpoint_every, state.step):
                with windows.pause():
                    skipped = windows.skipped_up_to_now()
                    stop_if(state.step, skipped)
                    if skipped and state.step < plan.total:
                        tracker.say(f"step {state.step}: no checkpoint, {skipped} steps skipped")
                    else:
                        _save(folder, stage, config, runtime, state)
            if plan.eval_every and plan.due(plan.eval_every, state.step):
                with windows.pause():
                    if figures := stage.evaluate(state):
                        tracker.log(state.step, figures)
        if (window := windows.take()) is not None:
            tracker.log(window.step, window.figures)
    return list_checkpoints(folder)[-1]


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


def _stop_if(max_skipped: int, folder: Path, stage_name: str, step: int, skipped: int) -> None:
    """End a run whose last ``skipped`` steps, up to ``step``, gave nothing.

    No checkpoint is made while steps are skipped. One made right before them is of the very state
    that they failed from: it is not called good.
    """
    if skipped < max_skipped:
        return
    found = list_checkpoints(folder)
    good = [path for path in found if checkpoint_step(path) < step - skipped]
    if good:
        last = (
            f"the last good checkpoint, from before them, is {good[-1]}. To go on from it with "
            f"other settings: --results-dir NEW {stage_name.replace('stage', 'stage_')}.ckpt="
            f"{good[-1]}"
        )
    else:
        last = "no checkpoint is left from before them" if found else "there is no checkpoint yet"
    raise UserError(
        f"{skipped} steps in a row had a loss or a gradient that is not finite and were skipped: "
        f"nothing is learned any more; {last}. Try a lower learning rate, training.clip_grad, or "
        "runtime.precision=fp32"
    )


def _restore(stage: Stage, runtime: Runtime, checkpoint: Path | None) -> TrainState:
    """The stage's state on the devices, from a checkpoint if there is one."""
    saved = None
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint)
        saved |= {name: stage.unpublish(saved[name]) for name in ("model", "ema")}
    return make_state(stage.model, runtime, saved, f"checkpoint {checkpoint}", stage.disc)


def _save(
    folder: Path, stage: Stage, config: RunConfig, runtime: Runtime, state: TrainState
) -> None:
    """Write the published layout; every process gathers, process 0 writes."""
    rates = {name: value.item() for name, value in stage.inputs(state.step).items()}
    content = {
        "step": state.step,
        "model": stage.publish(runtime.to_host(state.model.module.state_dict())),
        "ema": stage.publish(runtime.to_host(state.ema.state_dict())),
        "optimizer": runtime.to_host(state.model.optimizer_tensors()),
        "scheduler": {"next_step": rates},
        "config": config.to_dict(),
    }
    if state.disc is not None:
        content["disc"] = runtime.to_host(state.disc.module.state_dict())
        content["disc_optimizer"] = runtime.to_host(state.disc.optimizer_tensors())
    if runtime.process_index != 0:
        return
    try:
        save_checkpoint(folder, state.step, content, config.checkpoint.keep_last)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        reason = error if isinstance(error, OSError) else "no space left, or a limit on file sizes"
        before = "from the checkpoint before" if list_checkpoints(folder) else "from its start"
        raise UserError(
            f"the checkpoint of step {state.step} could not be written to {folder}: {reason}. Make "
            f"room and start the run again: it goes on {before}"
        ) from error
