"""Tracing of a run's train step for any number of chips, without data and without devices.

The run's own task, state, backend and step are built, but tensors are replaced by placeholders of
their shape where the backend would transfer them to the devices. The result is the graph that
torch_xla would compile on a pod, as HLO before partitioning.

It runs as a separate process (``python -m rae_xla.tools.plan.trace JOB.json``), because the
number of devices is fixed when torch_xla starts. It uses private APIs of the torch_xla version in
``compile.PINNED``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rae_xla.config import RunConfig, load_config
from rae_xla.tools.plan.hlo import parse_module
from rae_xla.tools.plan.hlo_flops import hlo_flops
from rae_xla.tools.plan.worker import end_with_parent

if TYPE_CHECKING:
    from rae_xla.checkpoint.train_state import TrainState
    from rae_xla.train.tasks.base import Task

MAX_DEVICES = 127
"""Maximum number of virtual devices of one process: torch stores their index in eight bits."""


@dataclass(frozen=True)
class TraceJob:
    """Input of the tracing process.

    Attributes:
        config: path of the run's configuration, without weights (``networks.without_weights``).
        task: key of ``rae_xla.train.tasks.TASKS``.
        chips: number of chips over all slices.
        slices: number of slices.
        batch: images per step, over all chips.
        out: path of the result, without a suffix.
    """

    config: str
    task: str
    chips: int
    slices: int
    batch: int
    out: str


@dataclass
class Argument:
    """One input of the step.

    Attributes:
        kind: ``parameters``, ``optimizer``, ``ema``, ``frozen``, ``batch`` or ``constants``.
        name: of the parameter or optimizer state; else empty.
        shape, dtype: of the unsharded tensor.
        sharding: in XLA's notation; empty if the compiler chooses it.
        shards: number of different shards.
        donated: whether its buffer is reused for an output of the step.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    shards: int
    donated: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes on each chip."""
        size = getattr(torch, self.dtype).itemsize
        return int(torch.Size(self.shape).numel()) * size // self.shards


@dataclass
class TracedStep:
    """Output of the tracing process in ``<out>.json``; ``<out>.pb`` has the HLO.

    Attributes:
        arguments: in the order of the HLO's parameters.
        idle_bytes: bytes per chip that the run keeps but this step does not use.
        flops: of one step over all chips, recomputation included.
        phase: phase of the run that the step belongs to.
        mesh: description of the device mesh.
        seconds: of building and tracing.
        host_seconds: processor time of tracing the step alone, as a run without replay does for
            every step.
    """

    arguments: list[Argument]
    idle_bytes: int
    flops: float
    phase: str
    mesh: str
    seconds: float
    host_seconds: float


class _Placeholders:
    """Replaces the XLA backend's transfer to the devices by placeholders, and records them."""

    def __init__(self, backend: Any) -> None:
        self._mesh = backend.device_mesh
        self.kind = "constants"
        self.by_handle: dict[Any, Argument] = {}
        self.by_tensor: dict[int, Argument] = {}
        self._alive: list[Tensor] = []

    def send(self, host: Tensor, spec: Any, **_: Any) -> Tensor:
        """Return a placeholder with the shape of ``host``, sharded according to ``spec``."""
        import torch_xla.core.xla_builder as xb
        import torch_xla.distributed.spmd as xs

        from rae_xla.runtime.xla import compat

        placeholder = cast("Tensor", xb.create_placeholder_tensor(tuple(host.shape), host.dtype))
        [handle] = compat.tensor_handles([placeholder])
        spec = tuple(spec) + (None,) * (host.dim() - len(spec))
        sharding, shards = "{replicated}", 1
        if any(spec):
            # `mark_sharding` would need the content; an annotation in the graph does not.
            xs.annotate_custom_sharding(placeholder, self._mesh, spec)
            sharding = compat.sharding_text(placeholder)
            shards = _count_shards(spec, self._mesh.shape())
        argument = Argument(
            self.kind, "", tuple(host.shape), str(host.dtype).removeprefix("torch."),
            sharding, shards,
        )  # fmt: skip
        self.by_handle[handle] = argument
        self.by_tensor[compat.tensor_id(placeholder)] = argument
        self._alive.append(placeholder)  # else its tensor id would be reused
        return placeholder

    @contextmanager
    def sending(self, kind: str) -> Iterator[None]:
        """Record tensors that are sent inside the context as this kind of argument."""
        before, self.kind = self.kind, kind
        with torch.device("meta"):
            yield
        self.kind = before

    def of(self, tensor: Tensor) -> Argument | None:
        """Return the argument that a placeholder represents, or None."""
        from rae_xla.runtime.xla import compat

        return self.by_tensor.get(compat.tensor_id(tensor))


def _count_shards(spec: tuple[Any, ...], axes: Any) -> int:
    shards = 1
    for entry in spec:
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            shards *= axes[axis]
    return shards


def trace_step(job: TraceJob) -> TracedStep:
    """Trace a step of the last phase of a run, and write its HLO to ``job.out + ".pb"``."""
    from rae_xla.checkpoint.train_state import make_state
    from rae_xla.runtime import start as start_backend
    from rae_xla.runtime.xla import compat

    start = time.perf_counter()
    config = config_for_tracing(load_config(job.config), job)
    if job.chips > MAX_DEVICES:
        compat.pretend_device_count(job.chips)

    # The TPU kernels are selected below, and nothing can be executed.
    plain = replace(config.runtime, attention="plain", replay=False)
    backend: Any = start_backend(plain, config.mesh, seed=config.training.global_seed)
    backend.choose_attention(config.runtime.attention, tpu=True)
    placeholders = _Placeholders(backend)
    backend.send = placeholders.send
    with placeholders.sending("constants"):
        task = build_task(config, job.task, backend)
    with placeholders.sending("parameters"):
        state = make_state(
            task.model,
            backend,
            disc=task.disc,
            first_moment_only=task.first_moment_only,
            average_widths=task.average_widths,
        )
    _label_state(state, placeholders)
    with placeholders.sending("frozen"):
        backend.place(task.frozen)
    number = last_step(config)
    with placeholders.sending("batch"):
        batch = backend.shard_batch(host_batch(job.batch, config.data.image_size, task, number))
    phase = task.phase(number)
    step = task.make_step(phase, state)
    with compat.execution_forbidden():
        metrics = step(batch)
    outputs = [metrics, *_updated_tensors(state)]

    _, inputs = compat.program_inputs(outputs)
    arguments = []
    for tensor, handle in zip(inputs, compat.tensor_handles(inputs), strict=True):
        unknown = Argument("constants", "", tuple(tensor.shape), str(tensor.dtype)[6:], "", 1)
        arguments.append(placeholders.by_handle.get(handle, unknown))
    Path(job.out + ".pb").write_bytes(compat.graph_hlo_proto(outputs))
    used = {id(argument) for argument in arguments}
    flops = hlo_flops(parse_module(compat.graph_hlo_text(outputs)), job.chips)
    begin = time.thread_time()
    with compat.execution_forbidden():
        step(batch)  # once more: the first time has imports and caches to fill
    host_seconds = time.thread_time() - begin
    return TracedStep(
        arguments=arguments,
        idle_bytes=sum(a.num_bytes for a in placeholders.by_handle.values() if id(a) not in used),
        flops=flops,
        phase=str(phase),
        mesh=str(backend.mesh),
        seconds=time.perf_counter() - start,
        host_seconds=host_seconds,
    )


def config_for_tracing(config: RunConfig, job: TraceJob) -> RunConfig:
    """Return the configuration of the run on ``job.chips`` virtual devices."""
    devices = min(job.chips, MAX_DEVICES) if job.chips <= MAX_DEVICES else 1
    return replace(
        config,
        runtime=replace(config.runtime, backend="xla", devices=devices, compile_cache=None),
        mesh=replace(config.mesh, dcn=replace(config.mesh.dcn, data=job.slices)),
    )


def build_task(config: RunConfig, name: str, backend: Any) -> Task:
    """Build a task without data; torch's default device must be ``meta``.

    Args:
        config: of the run.
        name: key of ``rae_xla.train.tasks.TASKS``.
        backend: that the task runs on.
    """
    from rae_xla.train.tasks import TASKS

    return TASKS[name](config, backend, None, STEPS_PER_EPOCH)


STEPS_PER_EPOCH = 1000
"""Placeholder: only the steps at which phases begin depend on it, and the last phase is planned."""


def last_step(config: RunConfig) -> int:
    """Return the index of a run's last step, at which every loss is active."""
    return max(1, config.training.epochs) * STEPS_PER_EPOCH - 1


def host_batch(batch: int, side: int, task: Task, step: int) -> dict[str, Tensor]:
    """Return an uninitialised batch with the tensors of ``train.batches`` and of the task.

    Args:
        batch: number of images.
        side: of an image in pixels.
        task: that receives the batch.
        step: index of the step.
    """
    task_inputs = {name: torch.empty(value.shape, dtype=value.dtype)
                   for name, value in task.inputs(step).items()}  # fmt: skip
    return (
        task.example_batch(batch, side)
        | {
            "row": torch.empty(batch, dtype=torch.int32),
            "step": torch.empty((), dtype=torch.int32),
        }
        | task_inputs
    )


def _label_state(state: TrainState, placeholders: _Placeholders) -> None:
    """Set kind, name and donation of the arguments that are training state."""

    def label(tensor: Tensor, kind: str, name: str, donated: bool) -> None:
        if (argument := placeholders.of(tensor)) is None:
            raise RuntimeError(f"no placeholder was created for {kind} {name}")
        argument.kind, argument.name, argument.donated = kind, name, donated

    for trained in filter(None, (state.model, state.disc)):
        for name, parameter in trained.module.named_parameters():
            label(parameter, "parameters", name, parameter.requires_grad)
        for name, moment in trained.optimizer_tensors().items():
            label(moment, "optimizer", name, True)
    for name, parameter in state.ema.named_parameters():
        label(parameter, "ema", name, True)
    for width, averages in state.averages.items():
        for name, average in averages.items():
            label(average, "ema", f"{name} (width {width:g})", True)


def _updated_tensors(state: TrainState) -> list[Tensor]:
    """Return the tensors that the step updates in place."""
    updated: list[Tensor] = [*state.ema.parameters()]
    for averages in state.averages.values():
        updated += averages.values()
    for trained in filter(None, (state.model, state.disc)):
        updated += [*trained.parameters().values(), *trained.optimizer_tensors().values()]
    if state.disc is not None:  # singular vectors of spectral normalisation
        updated += state.disc.module.buffers()
    return updated


def main(path: str) -> None:
    """Trace the step that the job file describes, and write the result."""
    end_with_parent()
    job = TraceJob(**json.loads(Path(path).read_text()))
    traced = trace_step(job)
    Path(job.out + ".json").write_text(json.dumps(asdict(traced)))


if __name__ == "__main__":
    main(sys.argv[1])
