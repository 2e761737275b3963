"""Section ``steps``: one step of real size of a task: time, utilisation and memory."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import RunConfig, load_config
from rae_xla.runtime import Backend
from rae_xla.tools.first_run.random_task import build_random_task
from rae_xla.tools.first_run.settings import FirstRun
from rae_xla.tools.plan.trace import host_batch, last_step
from rae_xla.train.flops import step_flops
from rae_xla.train.tasks.base import Task

WARM_UP, TIMED = 3, 10
SMOKE_TIMED = 2


def measure_step(run: FirstRun, task_name: str, rows: int, backend: Backend) -> dict[str, Any]:
    """Time steps of a task with random weights and random images.

    Args:
        run: the first run.
        task_name: ``stage1`` or ``stage2``.
        rows: images per device.
        backend: that computes.

    Returns:
        Seconds of the first step (with compilation) and of a later one, images/s, MFU, and bytes
        of memory.
    """
    config = step_config(run, task_name, rows * backend.mesh.batch_shards)
    task = build_random_task(config, task_name, backend)
    number = last_step(config)
    flops = step_flops(task, number, config.data.image_size)
    step, batch = _prepare(config, task, backend, rows)
    start = time.perf_counter()
    step(batch)
    backend.synchronize()
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        step(batch)
    backend.synchronize()
    start, timed = time.perf_counter(), SMOKE_TIMED if run.smoke else TIMED
    for _ in range(timed):
        metrics = step(batch)
    backend.synchronize()
    seconds = (time.perf_counter() - start) / timed
    images = rows * backend.mesh.batch_shards
    accelerator, memory = backend.accelerator(), backend.memory()
    peak_flops = None if accelerator is None else accelerator.peak_flops * backend.mesh.size
    return {
        "rows_per_device": rows,
        "first_step_s": first,
        "step_s": seconds,
        "images_per_s": images / seconds,
        "gflop_per_image": flops / 1e9,
        "mfu": None if peak_flops is None else flops * images / seconds / peak_flops,
        "peak_bytes": None if memory is None else memory.peak,
        "metrics_are_finite": bool(torch.isfinite(backend.fetch([metrics])[0]).all()),
        "description": backend.description,
    }


def step_config(run: FirstRun, task_name: str, images: int) -> RunConfig:
    """Return the configuration of a task's step with a global batch of ``images``."""
    file, settings = run.task_config(task_name)
    config = load_config(file, overrides=settings)
    training = replace(
        config.training, global_batch_size=images, batch_size=None, grad_accum_steps=1
    )
    return replace(config, training=training)


def _prepare(config: RunConfig, task: Task, backend: Backend, rows: int) -> tuple[Any, Any]:
    """Place a task; returns its compiled step and a batch on the devices."""
    state = make_state(task.model, backend, disc=task.disc)
    backend.place(task.frozen)
    number = last_step(config)
    phase = task.phase(number)
    own = rows * backend.mesh.batch_shards // backend.process_count
    host = host_batch(own, config.data.image_size, task, number)
    generator = torch.Generator().manual_seed(0)
    host["image"].random_(0, 256, generator=generator)
    host["label"].zero_()
    first_row = own * backend.process_index
    host["row"].copy_(torch.arange(first_row, first_row + own))
    host["step"].fill_(number)
    host |= task.inputs(number)
    return backend.compile(task.make_step(phase, state)), backend.shard_batch(host)
