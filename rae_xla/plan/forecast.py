"""The plan of a run on one topology: what follows from the compiler's facts, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rae_xla.config import RunConfig, check_mesh
from rae_xla.plan.arithmetic import Arithmetic
from rae_xla.plan.chips import Topology
from rae_xla.plan.facts import Facts
from rae_xla.plan.roofline import Bill, Roofline, bill, fsdp_minimum, roofline
from rae_xla.runtime.mesh import MeshShape, resolve_mesh
from rae_xla.train.plan import make_plan

IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""


@dataclass(frozen=True)
class Case:
    """One topology and one batch size.

    Attributes:
        topology: TPU slices.
        batch: images of a step.
        mesh: how the chips are arranged.
        config: of the run, with that batch and that mesh.
    """

    topology: Topology
    batch: int
    mesh: MeshShape
    config: RunConfig


def make_case(config: RunConfig, topology: Topology, batch: int | None = None) -> Case:
    """Fit a run to a topology.

    Raises:
        UserError: mesh or batch do not fit the number of chips.
    """
    settings = replace(config.mesh, dcn=replace(config.mesh.dcn, data=topology.slices))
    mesh = resolve_mesh(settings, topology.chips)
    training = config.training
    if batch is not None:
        training = replace(training, global_batch_size=batch, batch_size=None)
    config = replace(config, mesh=settings, training=training)
    return Case(topology, check_mesh(config, mesh.batch_parts).global_batch_size, mesh, config)


@dataclass(frozen=True)
class Forecast:
    """The plan of one case.

    Attributes:
        case: what it is for.
        arithmetic: of the networks.
        state: bytes a chip holds of the state, by arithmetic alone: all of it split evenly.
        minimum: bytes FSDP must send, see ``fsdp_minimum``.
        facts: what the compiler says; None where nothing was compiled.
        reason: why nothing was compiled, or why it failed; empty where it was.
        roofline: lower bounds of the time, from the facts or, without them, from arithmetic.
        bill: of the configured run at that time.
        notes: assumptions, for people.
    """

    case: Case
    arithmetic: Arithmetic
    state: dict[str, int]
    minimum: float
    facts: Facts | None
    reason: str
    roofline: Roofline
    bill: Bill
    notes: list[str]


def assess(
    case: Case,
    arithmetic: Arithmetic,
    facts: Facts | None,
    *,
    reason: str = "",
    images: int = IMAGENET,
    price: float | None = None,
    notes: list[str] | None = None,
) -> Forecast:
    """What follows from the facts, or without them from arithmetic.

    Args:
        case: what is planned.
        arithmetic: of the networks.
        facts: of the compiled step.
        reason: why there are none, or none that can be used.
        images: of the training data.
        price: of one chip for one hour.
        notes: assumptions made so far.
    """
    mesh, batch = case.mesh, case.batch
    shards = mesh.fsdp * mesh.tensor
    each = 2 if case.config.runtime.precision == "bf16" else 4
    minimum = fsdp_minimum(arithmetic.split, shards, each)
    state = {
        "parameters": 4 * arithmetic.trained // shards,
        "optimizer": 8 * arithmetic.trained // shards,
        "ema": 4 * arithmetic.averaged // shards,
        "frozen": 4 * arithmetic.frozen // shards,
    }
    usable = facts if facts is not None and facts.compiled.fits else None
    model_flops = arithmetic.step * batch
    # the least: all of the state is read, what is trained is written
    moved = 2.0 * sum(state.values()) - state["frozen"]
    # every slice hands over its gradients, each chip its part of them
    gradients = arithmetic.trained * each / shards if mesh.slices > 1 else 0.0
    times = roofline(
        case.topology,
        model_flops=model_flops,
        executed_flops=usable.flops if usable else model_flops,
        hbm_bytes=usable.moved if usable else moved,
        ici_bytes=usable.sent if usable else minimum,
        dcn_bytes=usable.sent_between_slices if usable else gradients,
    )
    plan = make_plan(case.config, max(1, images // batch), batch)
    return Forecast(
        case=case,
        arithmetic=arithmetic,
        state=state,
        minimum=minimum,
        facts=facts,
        reason=reason,
        roofline=times,
        bill=bill(case.topology, times.step, batch, plan.total, price),
        notes=list(notes or []),
    )
