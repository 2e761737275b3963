"""The training loop, the same for both stages and every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rae_xla.config import check_mesh
from rae_xla.data.shards import ShardIndex
from rae_xla.errors import UserError
from rae_xla.runtime import Runtime
from rae_xla.train.adamw import AdamW
from rae_xla.train.batches import open_stream, step_batches
from rae_xla.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from rae_xla.train.plan import make_plan
from rae_xla.train.schedule import make_schedule
from rae_xla.train.stage import Stage
from rae_xla.train.state import TrainState, make_state
from rae_xla.train.step import make_train_step
from rae_xla.train.tracking import Tracker
from rae_xla.train.window import Window

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def train(
    config: RunConfig,
    runtime: Runtime,
    index: ShardIndex,
    make_stage: Callable[[RunConfig, Runtime, ShardIndex], Stage],
    folder: Path,
) -> Path:
    """Train a stage to its end, from where the results folder stands.

    Returns:
        The last checkpoint.

    Raises:
        UserError: when the configuration, the data and the devices do not fit each other, or when
            the loss is no longer a number.
    """
    found = list_checkpoints(folder)
    stage = make_stage(config, runtime, index)
    batch = check_mesh(config, runtime.mesh.size).global_batch_size
    stream = open_stream(config, runtime, index, stage=stage.name, global_batch=batch)
    plan = make_plan(config, stream.steps_per_epoch, batch)
    state = _restore(stage, runtime, found[-1] if found else None)
    runtime.place(stage.frozen)
    if state.step >= plan.total:
        print(f"{folder}: complete, {state.step} steps done")
        return found[-1]

    settings = config.training.optimizer
    step = runtime.compile(
        make_train_step(
            stage.losses,
            state,
            AdamW(settings.betas, settings.eps, settings.weight_decay),
            seed=config.training.global_seed,
            ema_decay=config.training.ema_decay,
            clip_grad=config.training.clip_grad,
            accumulate=config.training.grad_accum_steps,
            autocast=runtime.autocast,
        )
    )
    schedule = make_schedule(config.training, stream.steps_per_epoch)
    feed = map(runtime.put, step_batches(stream, schedule, state.step, plan.total))
    speaks = runtime.process_index == 0
    with Tracker(folder, config, start=state.step, total=plan.total, speaks=speaks) as tracker:
        tracker.say(
            f"{stage.name} on {runtime.description}: {plan.total} steps of {batch} images, "
            f"{plan.per_epoch} to an epoch, from step {state.step}"
        )
        window = Window(plan, runtime, schedule)
        while state.step < plan.total:
            with window.waiting():
                inputs = next(feed)
            window.add(step(inputs))
            state.step += 1
            _report(window, tracker, folder)
            tracker.advance()
            if plan.due(plan.log_every, state.step):
                window.close(state.step)
            if plan.due(plan.sample_every, state.step) and plan.sample_every > 0:
                with window.pause():
                    tracker.images(state.step, stage.name, stage.preview(state.ema))
            if plan.due(plan.checkpoint_every, state.step):
                with window.pause():
                    _save(folder, stage, config, runtime, state)
        _report(window, tracker, folder)
    return list_checkpoints(folder)[-1]


def _report(window: Window, tracker: Tracker, folder: Path) -> None:
    """Log the window that was closed one step ago: its figures are there without waiting."""
    if (closed := window.take()) is None:
        return
    step, figures = closed
    tracker.log(step, figures)
    if not math.isfinite(figures["train/loss"]):
        found = list_checkpoints(folder)
        last = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        raise UserError(
            f"the loss is {figures['train/loss']} at step {step}; {last}. Try a lower learning "
            "rate, training.clip_grad, or runtime.precision=fp32"
        )


def _restore(
    stage: Stage,
    runtime: Runtime,
    checkpoint: Path | None,
) -> TrainState:
    """The stage's state on the devices, from a checkpoint if there is one."""
    saved = None
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint)
        saved |= {name: stage.unpublish(saved[name]) for name in ("model", "ema")}
    where = f"checkpoint {checkpoint}"
    return make_state(stage.model, runtime, saved, where)


def _save(
    folder: Path, stage: Stage, config: RunConfig, runtime: Runtime, state: TrainState
) -> None:
    """Write the published layout; every process gathers, process 0 writes."""
    content = {
        "step": state.step,
        "model": stage.publish(runtime.to_host(state.model.state_dict())),
        "ema": stage.publish(runtime.to_host(state.ema.state_dict())),
        "optimizer": runtime.to_host(state.optimizer_tensors()),
        "config": config.to_dict(),
    }
    if runtime.process_index != 0:
        return
    try:
        save_checkpoint(folder, state.step, content, config.checkpoint.keep_last)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        raise UserError(
            f"the checkpoint of step {state.step} could not be written to {folder}: {error}. Make "
            "room and start the run again: it goes on from the checkpoint before"
        ) from error
