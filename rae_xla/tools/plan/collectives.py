"""Collectives of a compiled step: kinds, bytes sent, and ones that an FSDP step should not have.

Bytes are those that one chip sends with the algorithm that sends least: a ring for all-gather,
reduce-scatter and all-reduce. A collective inside a loop counts once per iteration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rae_xla.tools.plan.hlo import Instruction, Module, Shape

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
"""Kind of a transfer to the host, which reduces it with other slices over the network."""

LANES = 128
"""Width of a register."""

LARGE_TENSOR = 2**20
"""Bytes above which an all-reduce of activations, or an all-gather in float32, is a fault."""


@dataclass(frozen=True)
class Collective:
    """One collective operation of the compiled step.

    Attributes:
        kind: one of ``KINDS``, or ``BETWEEN_SLICES``.
        shapes: shapes of its result on one chip, several for an all-reduce of several tensors.
        group_size: number of chips that take part.
        count: executions per step.
        bytes_sent: bytes that each chip sends per step, over all executions.
        source: operation of the model that caused it, if XLA recorded it.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group_size: int
    count: int
    bytes_sent: float
    source: str

    @property
    def dtypes(self) -> str:
        """Data types that are sent, by descending size, such as ``bf16+f32``."""
        sizes: dict[str, int] = {}
        for shape in self.shapes:
            sizes[shape.dtype] = sizes.get(shape.dtype, 0) + shape.num_bytes
        return "+".join(sorted(sizes, key=lambda dtype: -sizes[dtype]))


def find_collectives(module: Module, chips: int) -> list[Collective]:
    """Return the collectives of a compiled module, by descending bytes sent.

    The TPU compiler may split a collective into pieces that overlap with other work. The pieces
    share a channel and count as one collective.
    """
    by_channel: dict[tuple[str, str, str], Collective] = {}
    for instruction, where, count in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "megascale" in instruction.attributes:
            kind = BETWEEN_SLICES
        if kind not in (*KINDS, BETWEEN_SLICES):
            continue
        found = _collective(instruction, kind, where, count, chips)
        channel = instruction.attribute(r"channel_id=(\d+)") or f"{where}/{instruction.name}"
        # torch_xla gives all collectives of manual partitions the same channel.
        key = (kind, channel, found.source)
        known = by_channel.get(key)
        # Pieces may be inside a loop that overlaps them with other work.
        if known is None or found.count < known.count:
            by_channel[key] = found
    return sorted(by_channel.values(), key=lambda collective: -collective.bytes_sent)


def _collective(
    instruction: Instruction, kind: str, where: str, count: int, chips: int
) -> Collective:
    shapes = tuple(s for s in instruction.shapes if s.dims or s.dtype != "u32")
    group = _group_size(instruction, chips)
    started = instruction.opcode.endswith("-start")
    if started and kind == "collective-permute":
        shapes = shapes[:1]
    elif started and kind == "all-gather":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    size = sum(shape.num_bytes for shape in shapes)
    fraction = (group - 1) / group  # the part that each chip does not have yet
    if kind == "all-reduce" and "all-reduce-scatter" in where:
        kind, sent = "reduce-scatter", size * fraction
    elif kind == "reduce-scatter":
        sent = size * (group - 1)
    elif kind == "all-reduce":
        sent = 2 * size * fraction
    elif kind in ("all-gather", "all-to-all"):
        sent = size * fraction
    else:
        sent = float(size)
    source = instruction.attribute(r'op_name="([^"]*)"') or ""
    return Collective(kind, shapes, group, count, sent * count, source)


def _group_size(instruction: Instruction, chips: int) -> int:
    if (iota := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]")) is not None:
        return int(iota)
    listed = instruction.attribute(r"replica_groups=\{\{([\d,]+)\}")
    return len(listed.split(",")) if listed else chips


def bytes_sent_by_kind(collectives: Iterable[Collective]) -> dict[str, float]:
    """Return the bytes that each chip sends per step, by kind of collective."""
    total: dict[str, float] = {}
    for collective in collectives:
        total[collective.kind] = total.get(collective.kind, 0.0) + collective.bytes_sent
    return total


def find_faults(collectives: Iterable[Collective], weights: Iterable[tuple[int, ...]]) -> list[str]:
    """Describe collectives that an FSDP step in bf16 should not have.

    These are large all-reduces of anything but gradients of weights, and all-gathers in float32.

    Args:
        collectives: of a step in bf16.
        weights: unsharded shapes of the parameters.
    """
    known = {_without_ones(shape) for shape in weights}
    known |= {_without_ones(shape[::-1]) for shape in weights}
    found = []
    for collective in collectives:
        for shape in collective.shapes:
            if shape.num_bytes <= LARGE_TENSOR:
                continue
            dims = _without_ones(shape.dims)
            is_gradient = dims in known or any(_is_share(dims, weight) for weight in known)
            size = f"{shape.num_bytes / 2**20:.1f} MiB, {shape.dtype}{list(shape.dims)}"
            if collective.kind == "all-reduce" and not is_gradient:
                found.append(f"all-reduce of activations: {size} {collective.source}")
            if collective.kind == "all-gather" and shape.dtype == "f32":
                found.append(f"all-gather in float32: {size} {collective.source}")
    return found


def _is_share(dims: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether ``dims`` are some rows of a weight, after a first stage of its reduce-scatter.

    Columns may be padded to the width of a register.
    """
    if len(dims) != 2 or len(weight) != 2:
        return False
    padded = -(-weight[1] // LANES) * LANES
    return weight[0] % dims[0] == 0 and dims[1] in (weight[1], padded)


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
