"""What a compiled step sends between chips: every collective, its size, and whether it should be.

Bytes are those one chip sends, by the algorithm that sends least: a ring for all-gather,
reduce-scatter and all-reduce. What travels inside a loop counts once for each trip.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rae_xla.plan.hlo import Instruction, Module, Shape

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

BETWEEN_SLICES = "between-slices"
"""What chips hand to their hosts, which sum it with that of other slices over the network."""

LARGE = 2**20
"""Bytes from which an all-reduce of activations, or a gather in float32, is a fault."""


@dataclass(frozen=True)
class Collective:
    """One collective operation of the compiled step.

    Attributes:
        kind: one of ``KINDS``, or ``BETWEEN_SLICES``.
        shapes: of its result on one chip; of an all-reduce of many tensors, each of them.
        group: chips that take part together.
        times: how often it runs in a step.
        sent: bytes each chip sends in a step, all those times together.
        source: the operation of the model that needs it, where XLA still knows.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    times: int
    sent: float
    source: str

    @property
    def dtypes(self) -> str:
        """Types of what is sent, largest part first."""
        sizes: dict[str, int] = {}
        for shape in self.shapes:
            sizes[shape.dtype] = sizes.get(shape.dtype, 0) + shape.num_bytes
        return "+".join(sorted(sizes, key=lambda dtype: -sizes[dtype]))


def find_collectives(module: Module, chips: int) -> list[Collective]:
    """The collectives of a compiled module, the largest senders first.

    TPUs run a collective in pieces beside other work: pieces of one share its channel, and count
    as one.
    """
    by_channel: dict[tuple[str, str], Collective] = {}
    for instruction, where, times in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "megascale" in instruction.attributes:
            kind = BETWEEN_SLICES
        if kind not in (*KINDS, BETWEEN_SLICES):
            continue
        found = _collective(instruction, kind, where, times, chips)
        channel = instruction.attribute(r"channel_id=(\d+)") or f"{where}/{instruction.name}"
        known = by_channel.get((kind, channel))
        # the pieces may stand in a loop that does something else meanwhile
        if known is None or found.times < known.times:
            by_channel[kind, channel] = found
    return sorted(by_channel.values(), key=lambda collective: -collective.sent)


def _collective(
    instruction: Instruction, kind: str, where: str, times: int, chips: int
) -> Collective:
    shapes = tuple(s for s in instruction.shapes if s.dims or s.dtype != "u32")
    group = _group_size(instruction, chips)
    started = instruction.opcode.endswith("-start")
    if started and kind == "collective-permute":
        shapes = shapes[:1]
    elif started and kind == "all-gather":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    size = sum(shape.num_bytes for shape in shapes)
    share = (group - 1) / group
    if kind == "all-reduce" and "all-reduce-scatter" in where:
        kind, sent = "reduce-scatter", size * share
    elif kind == "reduce-scatter":
        sent = size * (group - 1)
    elif kind == "all-reduce":
        sent = 2 * size * share
    elif kind in ("all-gather", "all-to-all"):
        sent = size * share
    else:
        sent = float(size)
    source = instruction.attribute(r'op_name="([^"]*)"') or ""
    return Collective(kind, shapes, group, times, sent * times, source)


def _group_size(instruction: Instruction, chips: int) -> int:
    if (iota := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]")) is not None:
        return int(iota)
    listed = instruction.attribute(r"replica_groups=\{\{([\d,]+)\}")
    return len(listed.split(",")) if listed else chips


def sent_by_kind(collectives: Iterable[Collective]) -> dict[str, float]:
    """Bytes each chip sends in a step, by kind."""
    total: dict[str, float] = {}
    for collective in collectives:
        total[collective.kind] = total.get(collective.kind, 0.0) + collective.sent
    return total


def faults(collectives: Iterable[Collective], weights: Iterable[tuple[int, ...]]) -> list[str]:
    """What should not be in an FSDP step: large all-reduces of what is no weight's gradient, and
    weights that travel in float32 though the step computes in bf16.

    Args:
        collectives: of a step in bf16.
        weights: shapes of the parameters, whole.
    """
    known = {_without_ones(shape) for shape in weights}
    known |= {_without_ones(shape[::-1]) for shape in weights}
    found = []
    for collective in collectives:
        for shape in collective.shapes:
            if shape.num_bytes <= LARGE:
                continue
            is_weight = _without_ones(shape.dims) in known
            size = f"{shape.num_bytes / 2**20:.1f} MiB, {shape.dtype}{list(shape.dims)}"
            if collective.kind == "all-reduce" and not is_weight:
                found.append(f"all-reduce of activations: {size} {collective.source}")
            if collective.kind == "all-gather" and shape.dtype == "f32":
                found.append(f"all-gather in float32: {size} {collective.source}")
    return found


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
