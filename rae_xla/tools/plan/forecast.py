"""Forecast of a run on one topology with one batch size: memory, communication, time and cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rae_xla.config import RunConfig, split_batch
from rae_xla.errors import UserError
from rae_xla.runtime.mesh import MeshShape, check_tensor_axis, resolve_mesh
from rae_xla.tools.plan.arithmetic import ModelCounts
from rae_xla.tools.plan.compiled_step import CompiledStep
from rae_xla.tools.plan.host import HostTime
from rae_xla.tools.plan.roofline import Cost, Roofline, fsdp_minimum, roofline, run_cost
from rae_xla.tools.plan.tpus import Topology
from rae_xla.train.cadence import make_cadence

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k."""


@dataclass(frozen=True)
class Case:
    """One topology and one batch size.

    Attributes:
        topology: TPU slices.
        batch: images per step.
        mesh: shape of the device mesh.
        config: of the run, with that batch and that mesh.
    """

    topology: Topology
    batch: int
    mesh: MeshShape
    config: RunConfig


def make_case(config: RunConfig, topology: Topology, batch: int | None = None) -> Case:
    """Adapt a run to a topology.

    Args:
        config: of the run.
        topology: TPU slices; the number of slices replaces ``mesh.dcn.data``.
        batch: images per step; None for the configured number.

    Raises:
        UserError: if the mesh or the batch does not fit the number of chips, or a tensor group
            does not fit a host.
    """
    if config.mesh.dcn.fsdp > 1:
        raise UserError(
            f"mesh.dcn.fsdp is {config.mesh.dcn.fsdp}: the plan does not model weights that are "
            "gathered between slices; set it to 1"
        )
    settings = replace(config.mesh, dcn=replace(config.mesh.dcn, data=topology.slices))
    mesh = resolve_mesh(settings, topology.chips)
    check_tensor_axis(mesh, topology.chips_per_host)
    training = config.training
    if batch is not None:
        training = replace(training, global_batch_size=batch, batch_size=None)
    config = replace(config, mesh=settings, training=training)
    return Case(topology, split_batch(config, mesh.batch_shards).global_batch_size, mesh, config)


@dataclass(frozen=True)
class Forecast:
    """Predicted memory, communication, time and cost of one case.

    Attributes:
        case: topology and batch size.
        counts: parameters and FLOPs.
        state_bytes: bytes of training state per chip by kind, if all of it is sharded evenly.
        fsdp_minimum: bytes that FSDP must send per chip and step.
        step: the compiled step; None if nothing was compiled.
        host: what the host needs for a step; None if nothing was traced.
        not_compiled: reason why there is no compiled step, or why compilation failed; else empty.
        roofline: lower bounds of the step time, from the compiled step or else from ``counts``.
        cost: of the configured run at that step time.
        notes: assumptions, as sentences.
    """

    case: Case
    counts: ModelCounts
    state_bytes: dict[str, int]
    fsdp_minimum: float
    step: CompiledStep | None
    host: HostTime | None
    not_compiled: str
    roofline: Roofline
    cost: Cost
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether the step fits a chip's memory; None if the compiler did not determine it."""
        step = self.step
        if step is None or (step.result.failure and not step.result.required_hbm):
            return None
        return step.result.succeeded and step.hbm_bytes <= self.case.topology.generation.hbm_bytes


def make_forecast(
    case: Case,
    counts: ModelCounts,
    step: CompiledStep | None,
    *,
    host: HostTime | None = None,
    not_compiled: str = "",
    images: int = IMAGENET_IMAGES,
    price: float | None = None,
    notes: list[str] | None = None,
) -> Forecast:
    """Derive a forecast from the compiled step or, without one, from the counts.

    Args:
        case: topology and batch size.
        counts: parameters and FLOPs of the run.
        step: the compiled step, if any.
        host: what the host needs for a step, if it was measured.
        not_compiled: reason why there is none, or why compilation failed.
        images: images per epoch.
        price: of one chip for one hour.
        notes: assumptions, as sentences.
    """
    mesh, batch = case.mesh, case.batch
    shards = mesh.fsdp * mesh.tensor
    bytes_each = 2 if case.config.runtime.precision == "bf16" else 4
    minimum = fsdp_minimum(counts.split, shards, bytes_each)
    state_bytes = {
        "parameters": 4 * counts.trained // shards,
        "optimizer": 4 * counts.moments // shards,
        "ema": 4 * counts.averaged // shards,
        "frozen": 4 * counts.frozen // shards,
    }
    usable = step if step is not None and step.result.succeeded else None
    model_flops = counts.step * batch
    # Lower bound of the traffic: the state is read once, and its trained part written once.
    least_traffic = 2.0 * sum(state_bytes.values()) - state_bytes["frozen"]
    # Each chip sends its shard of the gradients to the other slices.
    gradients = counts.trained * bytes_each / shards if mesh.slices > 1 else 0.0
    times = roofline(
        case.topology,
        model_flops=model_flops,
        executed_flops=usable.flops if usable else model_flops,
        hbm_bytes=usable.hbm_traffic if usable else least_traffic,
        ici_bytes=usable.bytes_sent if usable else minimum,
        dcn_bytes=usable.bytes_sent_between_slices if usable else gradients,
        host=_host_seconds(case.config, host),
    )
    cadence = make_cadence(case.config, max(1, images // batch), batch)
    return Forecast(
        case=case,
        counts=counts,
        state_bytes=state_bytes,
        fsdp_minimum=minimum,
        step=step,
        host=host,
        not_compiled=not_compiled,
        roofline=times,
        cost=run_cost(case.topology, times.step, batch, cadence.total, price),
        notes=list(notes or []),
    )


def _host_seconds(config: RunConfig, host: HostTime | None) -> float:
    """Return the host's share of a step, as ``runtime.replay`` has it."""
    if host is None:
        return 0.0
    return host.replayed if config.runtime.replay else host.traced
