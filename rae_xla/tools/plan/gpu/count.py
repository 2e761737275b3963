"""Count of a run's train step on GPUs, on a machine without one.

The run's own task, state, backend and step are built on fake tensors, which have shapes and
storages but no memory. On several GPUs this is process 0 of as many, of which the others do not
exist. Operations are those of PyTorch on the CPU, with the autocast rules of CUDA.

It runs as a separate process (``python -m rae_xla.tools.plan.gpu.count JOB.json``), because the
process group, the autocast rules and ``torch.compile`` are settings of a process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.train_state import TrainState, make_state
from rae_xla.config import RunConfig, load_config
from rae_xla.ops import eager_random
from rae_xla.runtime import Backend
from rae_xla.runtime.process_group import Launch
from rae_xla.runtime.torch.backend import TorchBackend
from rae_xla.runtime.torch.compat import fake_processes
from rae_xla.runtime.torch.distributed_backend import DistributedTorchBackend
from rae_xla.tools.plan.gpu.compat import (
    compiled_without_kernels,
    cuda_autocast_rules,
    fake_tensors,
    forget_example_values,
)
from rae_xla.tools.plan.gpu.step_count import SentBytes, StepCount, extrapolate
from rae_xla.tools.plan.gpu.storages import OTHER, StepCounter, Totals
from rae_xla.tools.plan.trace import build_task, host_batch, last_step
from rae_xla.tools.plan.worker import end_with_parent
from rae_xla.train.tasks.base import Task

LARGEST_COUNTED = 3
"""Micro-batches of a step that are counted; further ones add the same as the third."""


@dataclass(frozen=True)
class CountJob:
    """Input of the counting process.

    Attributes:
        config: path of the run's configuration, without weights (``networks.without_weights``).
        task: key of ``rae_xla.train.tasks.TASKS``.
        gpus: number of GPUs over all hosts.
        rows: images per GPU and micro-batch, of every count.
        out: path of the result, without a suffix.
    """

    config: str
    task: str
    gpus: int
    rows: list[int]
    out: str


def count_step(config: RunConfig, task_name: str, gpus: int, rows: int) -> StepCount:
    """Count a step of the last phase of a run on fake tensors.

    Args:
        config: of the run, as ``networks.without_weights`` returns it.
        task_name: key of ``rae_xla.train.tasks.TASKS``.
        gpus: number of GPUs over all hosts.
        rows: images per GPU and micro-batch.
    """
    config = replace(config, runtime=replace(config.runtime, backend="torch"))
    number = config.training.grad_accum_steps
    if number <= LARGEST_COUNTED:
        return _count_fake_step(config, task_name, gpus, rows)
    fewer, more = (
        _count_fake_step(_with_micro_batches(config, n), task_name, gpus, rows)
        for n in (LARGEST_COUNTED - 1, LARGEST_COUNTED)
    )
    return extrapolate(fewer, more, number - LARGEST_COUNTED)


def _count_fake_step(config: RunConfig, task_name: str, gpus: int, rows: int) -> StepCount:
    with ExitStack() as contexts:
        enter = contexts.enter_context
        enter(fake_processes(gpus) if gpus > 1 else nullcontext())
        backend = start_backend(config, gpus)
        with torch.device("meta"):
            task = build_task(config, task_name, backend)
        enter(fake_tensors())
        _materialise(task)
        return count_built_step(task, backend, rows)


def _with_micro_batches(config: RunConfig, number: int) -> RunConfig:
    """Return the run with another number of micro-batches, which keep their size."""
    training = config.training
    batch = training.global_batch_size
    if batch is not None:
        batch = batch // training.grad_accum_steps * number
    training = replace(training, grad_accum_steps=number, global_batch_size=batch)
    return replace(config, training=training)


def count_built_step(task: Task, backend: Backend, rows: int) -> StepCount:
    """Count a step of the last phase of a run, on fake tensors or on real ones.

    Args:
        task: newly built, on the CPU.
        backend: computes on the CPU.
        rows: images per process and micro-batch.
    """
    start = time.perf_counter()
    config = task.config
    compiled = compiled_without_kernels() if config.runtime.compile else nullcontext()
    with cuda_autocast_rules(), _draws_of_a_gpu(), compiled, StepCounter() as counter:
        state = make_state(
            task.model,
            backend,
            disc=task.disc,
            first_moment_only=task.first_moment_only,
            average_widths=task.average_widths,
        )
        backend.place(task.frozen)
        number = last_step(config)
        phase = task.phase(number)
        images = rows * config.training.grad_accum_steps
        host = host_batch(images, config.data.image_size, task, number)
        # Zeros are valid labels, which real tensors need.
        batch = backend.shard_batch({name: torch.zeros_like(t) for name, t in host.items()})
        step = backend.compile(task.make_step(phase, state))
        step(batch)  # creates what is created once, and compiles
        if config.runtime.compile:
            forget_example_values()
        label_state(counter, backend, task, state)
        counter.label("batch", batch.values())
        state_bytes = {kind: size for kind, size in counter.live.items() if kind != OTHER}
        counter.begin()
        step(batch)
        totals = counter.totals
    return make_count(totals, rows, state_bytes, str(phase), time.perf_counter() - start)


@contextmanager
def _draws_of_a_gpu() -> Iterator[None]:
    """Draw random numbers all at once, as on a GPU, instead of in blocks for the CPU's cache."""
    block = eager_random.CPU_BLOCK
    eager_random.CPU_BLOCK = sys.maxsize
    try:
        yield
    finally:
        eager_random.CPU_BLOCK = block


def make_count(
    totals: Totals, rows: int, state: dict[str, int], phase: str = "", seconds: float = 0.0
) -> StepCount:
    """Return the result for the totals of a step."""
    sent = [
        SentBytes(kind, list(ranks), count, size)
        for (kind, ranks), (count, size) in totals.sent.items()
    ]
    return StepCount(
        rows=rows,
        state=state,
        peak=totals.peak,
        peak_by_kind=totals.peak_by_kind,
        flops=totals.flops,
        product_bytes=totals.product_bytes,
        other_bytes=totals.other_bytes,
        operations=totals.operations,
        sent=sent,
        phase=phase,
        seconds=seconds,
    )


def start_backend(config: RunConfig, gpus: int) -> Backend:
    """Return the backend of the run for process 0 of ``gpus``, computing on the CPU."""
    seed = config.training.global_seed
    if gpus == 1:
        return TorchBackend(config.runtime, config.mesh, seed=seed, device=torch.device("cpu"))
    launch = Launch(index=0, count=gpus, local_index=0)
    return DistributedTorchBackend(launch, config.runtime, config.mesh, seed=seed)


def label_state(counter: StepCounter, backend: Backend, task: Task, state: TrainState) -> None:
    """Set the kinds of the storages that live between steps."""
    trained = [t for t in (state.model, state.disc) if t is not None]
    counter.label("frozen", _local(backend, _tensors_of(task.frozen)))
    for of in trained:
        counter.label("parameters", _local(backend, _tensors_of(of.module)))
        counter.label("optimizer", _local(backend, of.optimizer_tensors().values()))
        gradients = [p.grad for p in of.parameters().values() if p.grad is not None]
        counter.label("gradients", _local(backend, gradients))
    averages = [t for of in state.averages.values() for t in of.values()]
    counter.label("ema", _local(backend, [*_tensors_of(state.ema), *averages]))


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _local(backend: Backend, tensors: Iterable[Tensor]) -> list[Tensor]:
    return backend.local_shards(list(tensors))


def _materialise(task: Task) -> None:
    """Replace the networks' tensors on the meta device by fake ones on the CPU."""
    for module in (task.model, task.disc, task.frozen):
        if module is not None:
            module.to_empty(device="cpu")


def main(path: str) -> None:
    """Count the steps that the job file describes, and write the results."""
    end_with_parent()
    torch.set_num_threads(1)
    job = CountJob(**json.loads(Path(path).read_text()))
    config = load_config(job.config)
    counts = [count_step(config, job.task, job.gpus, rows) for rows in job.rows]
    Path(job.out + ".json").write_text(json.dumps([asdict(count) for count in counts]))


if __name__ == "__main__":
    main(sys.argv[1])
