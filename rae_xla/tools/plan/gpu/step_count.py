"""StepCount: what one GPU needs for one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class SentBytes:
    """Collective operations of one kind over one group of processes, per step.

    Attributes:
        kind: name of the operation.
        ranks: processes that take part.
        count: number of operations.
        num_bytes: bytes that each process sends.
    """

    kind: str
    ranks: list[int]
    count: int
    num_bytes: int


@dataclass
class StepCount:
    """What one GPU needs for one optimizer step.

    Attributes:
        rows: images per micro-batch on the GPU.
        state: bytes between steps, by kind.
        peak: largest number of bytes during the step.
        peak_by_kind: its parts.
        flops: executed, recomputation included.
        product_bytes: bytes read and written by matrix products, convolutions and attention.
        other_bytes: bytes read and written by all other operations, not fused.
        operations: number of operations.
        sent: collective operations.
        phase: phase of the run that the step belongs to.
        seconds: that building and counting took.
    """

    rows: int
    state: dict[str, int]
    peak: int
    peak_by_kind: dict[str, int]
    flops: int
    product_bytes: int
    other_bytes: int
    operations: int
    sent: list[SentBytes] = field(default_factory=list)
    phase: str = ""
    seconds: float = 0.0

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> StepCount:
        """Build a count from the values of its JSON."""
        return cls(**content | {"sent": [SentBytes(**sent) for sent in content["sent"]]})


def extrapolate(fewer: StepCount, more: StepCount, further: int) -> StepCount:
    """Return the count of a step with ``further`` more micro-batches than ``more``.

    From the second micro-batch on, each adds the same: the first one creates the gradients.

    Args:
        fewer: count with one micro-batch less than ``more``.
        more: count with at least three.
        further: number of micro-batches to add.
    """

    def grown(name: str) -> int:
        small, large = getattr(fewer, name), getattr(more, name)
        return int(large + further * (large - small))

    def grown_kinds(small: dict[str, int], large: dict[str, int]) -> dict[str, int]:
        return {kind: n + further * (n - small.get(kind, 0)) for kind, n in large.items()}

    sent = []
    for small, large in zip(fewer.sent, more.sent, strict=True):
        count = large.count + further * (large.count - small.count)
        num_bytes = large.num_bytes + further * (large.num_bytes - small.num_bytes)
        sent.append(replace(large, count=count, num_bytes=num_bytes))
    return replace(
        more,
        state=grown_kinds(fewer.state, more.state),
        peak=grown("peak"),
        peak_by_kind=grown_kinds(fewer.peak_by_kind, more.peak_by_kind),
        flops=grown("flops"),
        product_bytes=grown("product_bytes"),
        other_bytes=grown("other_bytes"),
        operations=grown("operations"),
        sent=sent,
        seconds=fewer.seconds + more.seconds,
    )
