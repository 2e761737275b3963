"""Roofline model: lower bound of the step time from FLOPs and bytes, and the resulting cost.

The host launches a step while the chips compute the previous one, so it is one more resource.

Compute, memory and interconnect are assumed to work at their peak and in parallel; a real step is
slower. The memory time is the least certain: the compiler keeps some results in on-chip memory that
its text does not mark, and ``traffic`` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rae_xla.tools.plan.tpus import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step needs of each resource of a chip at its peak rate.

    Attributes:
        compute: matrix units, in bf16.
        memory: HBM.
        interconnect: links between the chips of a slice.
        network: data-centre network between slices.
        host: launching the step from Python, on the machine that planned it; 0 if not measured.
        mfu: model FLOP utilisation at the step time of the slowest resource, without recomputation.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    host: float
    mfu: float

    @property
    def step(self) -> float:
        """Seconds per step: the time of the slowest resource."""
        return max(self.compute, self.memory, self.interconnect, self.network, self.host)

    @property
    def limit(self) -> str:
        """Name of the slowest resource."""
        times = {
            "compute": self.compute,
            "memory": self.memory,
            "interconnect": self.interconnect,
            "network": self.network,
            "host": self.host,
        }
        return max(times, key=lambda name: times[name])


def roofline(
    topology: Topology,
    *,
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    ici_bytes: float,
    dcn_bytes: float,
    host: float = 0.0,
) -> Roofline:
    """Return the roofline of one step.

    Args:
        topology: TPU slices.
        model_flops: FLOPs per step over all chips, without recomputation.
        executed_flops: the same with recomputation.
        hbm_bytes: bytes that each chip reads and writes per step.
        ici_bytes: bytes that each chip sends within its slice per step.
        dcn_bytes: bytes that each chip sends to other slices per step, through its host.
        host: seconds that the host needs to launch a step, while the chips compute the one before.
    """
    chip = topology.generation
    compute = executed_flops / topology.chips / chip.peak_flops
    times = Roofline(
        compute=compute,
        memory=hbm_bytes / chip.hbm_bandwidth,
        interconnect=ici_bytes / chip.ici_bandwidth,
        network=dcn_bytes / chip.dcn_bandwidth,
        host=host,
        mfu=0.0,
    )
    return replace(times, mfu=model_flops / topology.chips / chip.peak_flops / times.step)


def fsdp_minimum(parameters: float, shards: int, bytes_each: int) -> float:
    """Return the bytes that a chip must send per step under FSDP (ZeRO-3, Rajbhandari et al. 2020).

    All weights are gathered for the forward pass and again for the backward pass, and all gradients
    are reduce-scattered once, each over a ring. A step that keeps gathered weights can send less.

    Args:
        parameters: number of sharded parameters.
        shards: number of chips that a replica is sharded over.
        bytes_each: bytes per parameter while it is sent.
    """
    return 3 * parameters * bytes_each * (shards - 1) / shards


@dataclass(frozen=True)
class Cost:
    """Duration and price of the configured run.

    Attributes:
        steps: number of steps of the run.
        images_per_second: over all chips.
        hours: from the first step to the last.
        chip_hours: hours times chips.
        price: in the currency of the given price; None without one.
    """

    steps: int
    images_per_second: float
    hours: float
    chip_hours: float
    price: float | None


def run_cost(
    topology: Topology, step_seconds: float, batch: int, steps: int, price: float | None
) -> Cost:
    """Return duration and price of a run; ``price`` is that of one chip for one hour."""
    hours = steps * step_seconds / 3600
    chip_hours = hours * topology.chips
    return Cost(
        steps=steps,
        images_per_second=batch / step_seconds,
        hours=hours,
        chip_hours=chip_hours,
        price=None if price is None else price * chip_hours,
    )
