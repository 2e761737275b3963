"""From bytes and FLOPs to time and money: the least time the slowest resource needs.

This is a model: compute, memory and interconnect each at its peak and all at once. A real step is
slower than the peaks allow. Of the three the memory's time is the least certain: the compiler keeps
some results on the chip without saying so, and ``traffic`` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.plan.chips import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds a step needs of each resource of a chip at its peak.

    Attributes:
        compute: of the matrix units, in bf16.
        memory: of HBM.
        interconnect: of the links between the chips of a slice.
        network: of the data centre's network between slices.
        mfu: the share of peak FLOP/s that is left for the model if the slowest resource sets the
            time; recomputation does not count as the model's.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    mfu: float

    @property
    def step(self) -> float:
        """Seconds of a step: the slowest resource's."""
        return max(self.compute, self.memory, self.interconnect, self.network)

    @property
    def limit(self) -> str:
        """The name of the slowest resource."""
        times = {
            "compute": self.compute,
            "memory": self.memory,
            "interconnect": self.interconnect,
            "network": self.network,
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
) -> Roofline:
    """The roofline of one step.

    Args:
        topology: what it runs on.
        model_flops: of a step, over all chips, without recomputation.
        executed_flops: the same with it.
        hbm_bytes: each chip reads and writes.
        ici_bytes: each chip sends within its slice.
        dcn_bytes: each chip sends to other slices, by way of its host.
    """
    chip = topology.chip
    compute = executed_flops / topology.chips / chip.peak_flops
    times = Roofline(
        compute=compute,
        memory=hbm_bytes / chip.hbm_bandwidth,
        interconnect=ici_bytes / chip.ici_bandwidth,
        network=dcn_bytes / chip.dcn_bandwidth,
        mfu=0.0,
    )
    mfu = model_flops / topology.chips / chip.peak_flops / times.step
    return Roofline(times.compute, times.memory, times.interconnect, times.network, mfu)


def fsdp_minimum(parameters: float, shards: int, bytes_each: int) -> float:
    """Bytes a chip must send in a step when ``shards`` chips share the state: every weight gathered
    for the forward and again for the backward pass, every gradient scattered once (ZeRO-3,
    Rajbhandari et al. 2020), each by a ring. A step that keeps what it gathered can send less.
    """
    return 3 * parameters * bytes_each * (shards - 1) / shards


@dataclass(frozen=True)
class Bill:
    """What the configured run costs.

    Attributes:
        steps: of the whole run.
        images_per_second: of all chips.
        hours: from the first step to the last.
        chip_hours: hours times chips.
        price: in the currency the price was given in, None without a price.
    """

    steps: int
    images_per_second: float
    hours: float
    chip_hours: float
    price: float | None


def bill(
    topology: Topology, step_seconds: float, batch: int, steps: int, price: float | None
) -> Bill:
    """The bill of a run; ``price`` is of one chip for one hour."""
    hours = steps * step_seconds / 3600
    chip_hours = hours * topology.chips
    return Bill(
        steps=steps,
        images_per_second=batch / step_seconds,
        hours=hours,
        chip_hours=chip_hours,
        price=None if price is None else price * chip_hours,
    )
