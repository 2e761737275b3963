"""Trace the very step a run trains with, for any number of chips, without data and without memory.

The run's own stage, state, runtime and step are built; only where the runtime would send a tensor
to the devices, a placeholder of its shape is made. What comes out is the graph torch_xla would have
compiled on a pod, as XLA's own HLO, before it is cut up for the chips.

Run as a process of its own (``python -m rae_xla.plan.trace JOB.json``): the number of devices is
fixed when torch_xla starts. Private parts of torch_xla 2.9 are used: see ``versions``.
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
from rae_xla.errors import UserError
from rae_xla.plan.flops import count_flops
from rae_xla.plan.hlo import parse_module
from rae_xla.plan.worker import end_with_parent

if TYPE_CHECKING:
    from rae_xla.train.stage import Stage
    from rae_xla.train.state import TrainState

MAX_DEVICES = 127
"""Virtual devices of one process: torch counts them in eight bits."""


@dataclass(frozen=True)
class TraceJob:
    """What is to be traced.

    Attributes:
        config: path of the run's configuration, with networks that can be built (``networks``).
        stage: ``stage1`` or ``stage2``.
        chips: devices of the mesh, over all slices.
        slices: of the mesh.
        batch: images of a step, over all chips.
        out: path of the result, without endings.
    """

    config: str
    stage: str
    chips: int
    slices: int
    batch: int
    out: str


@dataclass
class Argument:
    """One input of the step.

    Attributes:
        kind: ``parameters``, ``optimizer``, ``ema``, ``frozen``, ``batch`` or ``constants``.
        name: of the parameter, if it is one.
        shape, dtype: of the whole tensor.
        sharding: how it is split, as XLA writes it; empty where the compiler decides.
        shards: into how many different parts it is split.
        donated: whether the step's result takes its place.
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
        """On each chip."""
        size = getattr(torch, self.dtype).itemsize
        return int(torch.Size(self.shape).numel()) * size // self.shards


@dataclass
class Traced:
    """A traced step: ``<out>.pb`` holds its HLO, ``<out>.json`` this.

    Attributes:
        arguments: in the order of the HLO's parameters.
        held: bytes on each chip that the run holds and this step does not use.
        flops: of one step over all chips, recomputation included.
        phase: the kind of step.
        mesh: for people.
        seconds: of building and tracing.
    """

    arguments: list[Argument]
    held: int
    flops: float
    phase: str
    mesh: str
    seconds: float


class _Placeholders:
    """Takes the place of a runtime's transfer to the devices."""

    def __init__(self, runtime: Any) -> None:
        self._mesh = runtime._mesh
        self.kind = "constants"
        self.by_handle: dict[Any, Argument] = {}
        self.by_tensor: dict[int, Argument] = {}
        self._alive: list[Tensor] = []

    def send(self, host: Tensor, spec: Any, **_: Any) -> Tensor:
        """A tensor on the devices that has a shape and no content."""
        import torch_xla
        import torch_xla.core.xla_builder as xb
        import torch_xla.distributed.spmd as xs

        backend = torch_xla._XLAC
        placeholder = cast("Tensor", xb.create_placeholder_tensor(tuple(host.shape), host.dtype))
        [handle] = backend._get_tensors_handle([placeholder])
        spec = tuple(spec) + (None,) * (host.dim() - len(spec))
        sharding, shards = "{replicated}", 1
        if any(spec):
            # marking it as split would ask for its content; this adds a note to the graph instead
            xs.annotate_custom_sharding(placeholder, self._mesh, spec)
            sharding = backend._get_xla_sharding_spec(placeholder)
            shards = _parts(spec, self._mesh.shape())
        argument = Argument(
            self.kind, "", tuple(host.shape), str(host.dtype).removeprefix("torch."),
            sharding, shards,
        )  # fmt: skip
        self.by_handle[handle] = argument
        self.by_tensor[backend._xla_get_tensor_id(placeholder)] = argument
        self._alive.append(placeholder)  # its number would be given to another
        return placeholder

    @contextmanager
    def sending(self, kind: str) -> Iterator[None]:
        """Tensors sent in here are of this kind."""
        before, self.kind = self.kind, kind
        with torch.device("meta"):
            yield
        self.kind = before

    def of(self, tensor: Tensor) -> Argument | None:
        """The argument a tensor is."""
        import torch_xla

        return self.by_tensor.get(torch_xla._XLAC._xla_get_tensor_id(tensor))


def _parts(spec: tuple[Any, ...], axes: Any) -> int:
    parts = 1
    for entry in spec:
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            parts *= axes[axis]
    return parts


def trace_step(job: TraceJob) -> Traced:
    """Trace the last kind of step of a run and write ``job.out + ".pb"``."""
    start = time.perf_counter()
    config = planned(load_config(job.config), job)
    if job.chips > MAX_DEVICES:
        _count_devices(job.chips)

    from rae_xla.runtime import start as start_runtime
    from rae_xla.train.state import make_state

    here = replace(config.runtime, attention="plain")
    runtime: Any = start_runtime(here, config.mesh, seed=config.training.global_seed)
    runtime.choose_attention(config.runtime.attention, tpu=True)
    placed = _Placeholders(runtime)
    runtime._send = placed.send

    import torch_xla

    with placed.sending("constants"):
        stage = build_stage(config, job.stage, runtime)
    with placed.sending("parameters"):
        state = make_state(stage.model, runtime, disc=stage.disc)
    _name_state(state, placed)
    with placed.sending("frozen"):
        runtime.place(stage.frozen)
    number = last_step(config)
    with placed.sending("batch"):
        batch = runtime.put(host_batch(job.batch, config.data.image_size, stage, number))
    phase = stage.phase(number)
    step = stage.make_step(phase, state)
    torch_xla._XLAC._set_allow_execution(False)
    figures = step(batch)
    outputs = [figures, *_changed(state)]

    backend = torch_xla._XLAC
    _, data = backend._get_tensors_xla_device_data_node(outputs)
    arguments = []
    for tensor, handle in zip(data, backend._get_tensors_handle(list(data)), strict=True):
        unknown = Argument("constants", "", tuple(tensor.shape), str(tensor.dtype)[6:], "", 1)
        arguments.append(placed.by_handle.get(handle, unknown))
    Path(job.out + ".pb").write_bytes(backend._get_xla_tensors_hlo_proto(outputs))
    used = {id(argument) for argument in arguments}
    return Traced(
        arguments=arguments,
        held=sum(a.num_bytes for a in placed.by_handle.values() if id(a) not in used),
        flops=count_flops(parse_module(backend._get_xla_tensors_hlo(outputs)), job.chips),
        phase=str(phase),
        mesh=str(runtime.mesh),
        seconds=time.perf_counter() - start,
    )


def planned(config: RunConfig, job: TraceJob) -> RunConfig:
    """A run's configuration for a mesh of so many virtual devices."""
    devices = min(job.chips, MAX_DEVICES) if job.chips <= MAX_DEVICES else 1
    return replace(
        config,
        runtime=replace(config.runtime, backend="xla", devices=devices, compile_cache=None),
        mesh=replace(config.mesh, dcn=replace(config.mesh.dcn, data=job.slices)),
    )


def build_stage(config: RunConfig, name: str, runtime: Any) -> Stage:
    """The stage of a run, without data. Call it where torch's default device is ``meta``."""
    from rae_xla.train.stage1 import Stage1
    from rae_xla.train.stage2 import Stage2

    stage_class = {"stage1": Stage1, "stage2": Stage2}[name]
    return cast("Stage", stage_class(config, runtime, None, STEPS_PER_EPOCH))


STEPS_PER_EPOCH = 1000
"""Only the order of the phases depends on it, and the last one is planned."""


def last_step(config: RunConfig) -> int:
    """The number of a run's last step, by when every loss has begun."""
    return max(1, config.training.epochs) * STEPS_PER_EPOCH - 1


def host_batch(batch: int, side: int, stage: Stage, step: int) -> dict[str, Tensor]:
    """What a step takes (see ``train.batches``): shapes alone where the default device is meta."""
    told = {name: torch.empty(value.shape, dtype=value.dtype)
            for name, value in stage.inputs(step).items()}  # fmt: skip
    return {
        "image": torch.empty(batch, 3, side, side, dtype=torch.uint8),
        "label": torch.empty(batch, dtype=torch.int64),
        "row": torch.empty(batch, dtype=torch.int32),
        "step": torch.empty((), dtype=torch.int32),
    } | told


def _name_state(state: TrainState, placed: _Placeholders) -> None:
    """Say which argument is what of the state, and which the step overwrites."""

    def note(tensor: Tensor, kind: str, name: str, changed: bool) -> None:
        if (argument := placed.of(tensor)) is None:
            raise UserError(f"the plan lost sight of {kind} {name}: please report this")
        argument.kind, argument.name, argument.donated = kind, name, changed

    for trained in filter(None, (state.model, state.disc)):
        for name, parameter in trained.module.named_parameters():
            note(parameter, "parameters", name, parameter.requires_grad)
        for name, moment in trained.optimizer_tensors().items():
            note(moment, "optimizer", name, True)
    for name, parameter in state.ema.named_parameters():
        note(parameter, "ema", name, True)


def _changed(state: TrainState) -> list[Tensor]:
    """What the step overwrites."""
    changed: list[Tensor] = [*state.ema.parameters()]
    for trained in filter(None, (state.model, state.disc)):
        changed += [*trained.parameters().values(), *trained.optimizer_tensors().values()]
    if state.disc is not None:  # the singular vectors of spectral norms
        changed += state.disc.module.buffers()
    return changed


def _count_devices(chips: int) -> None:
    """More devices than torch can count in one process: nothing is placed, so a number will do."""
    import torch_xla.runtime as xr

    vars(xr)["global_runtime_device_count"] = lambda: chips


def main(path: str) -> None:
    """The process: read a job, write its result."""
    end_with_parent()
    job = TraceJob(**json.loads(Path(path).read_text()))
    traced = trace_step(job)
    Path(job.out + ".json").write_text(json.dumps(asdict(traced)))


if __name__ == "__main__":
    main(sys.argv[1])
