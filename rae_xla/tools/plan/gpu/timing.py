"""Range of the step time on GPUs, from the counts of a step and the specifications of the GPU.

The model: products, convolutions and attention take their FLOPs at a share of the peak; all other
operations take the bytes that they read and write at a share of the memory's bandwidth;
communication takes the bytes that a ring sends at a share of the bandwidth between the GPUs. At the
fast end communication overlaps with computation, at the slow end it does not. A step that is not
compiled takes at least the time in which the host starts its operations. The shares are assumptions
(``FAST`` and ``SLOW``), not measurements of this system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rae_xla.tools.plan.gpu.cards import Cluster
from rae_xla.tools.plan.gpu.step_count import StepCount


@dataclass(frozen=True)
class Assumptions:
    """How well the resources of a GPU are used.

    Attributes:
        products: share of the peak FLOP/s.
        memory: share of the memory's bandwidth.
        links: share of the bandwidth between GPUs.
        overlap: whether communication overlaps with computation.
        unfused: share of the bytes of other operations that remains if they are compiled.
        launch: seconds that the host needs to start an operation that is not compiled.
    """

    products: float
    memory: float
    links: float
    overlap: bool
    unfused: float
    launch: float


FAST = Assumptions(0.75, 0.90, 0.90, True, 1 / 4, 5e-6)
SLOW = Assumptions(0.40, 0.70, 0.50, False, 1 / 2, 15e-6)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by resource.

    Attributes:
        products: matrix products, convolutions and attention.
        other: all other operations.
        links: communication.
        launch: the host's time to start the operations; 0 if they are compiled.
        overlap: whether communication overlaps with computation.
    """

    products: float
    other: float
    links: float
    launch: float
    overlap: bool

    @property
    def step(self) -> float:
        """Seconds of the step."""
        device = self.products + self.other
        device = max(device, self.links) if self.overlap else device + self.links
        return max(device, self.launch)

    @property
    def limit(self) -> str:
        """Name of the resource that takes most of the step."""
        parts = {
            "products": self.products,
            "memory": self.other,
            "communication": self.links,
            "host": self.launch,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(
    count: StepCount, cluster: Cluster, assumed: Assumptions, *, bf16: bool, compiled: bool
) -> StepTime:
    """Return the time of a step.

    Args:
        count: of the step on one GPU.
        cluster: that it runs on.
        assumed: how well the GPUs are used.
        bf16: whether products are in bf16; else in float32.
        compiled: whether operations are fused and started together.
    """
    card = cluster.card
    peak = card.peak_flops if bf16 else card.fp32_flops
    share = assumed.unfused if compiled else 1.0
    links = sum(
        sent.num_bytes / (assumed.links * cluster.bandwidth(sent.ranks)) for sent in count.sent
    )
    return StepTime(
        products=count.flops / (assumed.products * peak),
        other=share * count.other_bytes / (assumed.memory * card.bandwidth),
        links=links,
        launch=0.0 if compiled else count.operations * assumed.launch,
        overlap=assumed.overlap,
    )


def sent_by_axis(count: StepCount, axes: Mapping[tuple[int, ...], str]) -> dict[str, float]:
    """Return the bytes that each GPU sends per step, by ``<axis> <kind of operation>``."""
    total: dict[str, float] = {}
    for sent in count.sent:
        name = f"{axes.get(tuple(sent.ranks), 'all')} {sent.kind}"
        total[name] = total.get(name, 0.0) + sent.num_bytes
    return total
