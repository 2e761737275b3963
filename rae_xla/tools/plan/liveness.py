"""Peak memory of a compiled step, estimated from the schedule of its instructions.

This approximates the compiler's buffer assignment: a result is live from its creation to its last
use, results that are written in place share a buffer, and padding is ignored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rae_xla.tools.plan.hlo import Computation, Instruction, Module, Shape, called_computations

_NO_BUFFER = {"parameter", "constant", "iota", "partition-id", "replica-id", "after-all"}
# Their result aliases their first operand, element by element.
_ALIASES = {"bitcast", "while", "opt-barrier", "optimization-barrier", "add-dependency"}

Buffer = tuple[str, int]
"""Name of the instruction that creates the buffer, and the index of its result."""
ResultBuffers = list[tuple[Buffer, ...]]
"""For each element of an instruction's result, the buffers that hold it."""


@dataclass(frozen=True)
class PeakMemory:
    """Buffers that are live at the peak of memory use.

    Attributes:
        num_bytes: of all live buffers except arguments.
        by_kind: bytes of ``activations``, ``weights`` (gathered, and gradients) and ``other``.
        largest: (shape, total bytes, source operation) of the shapes that use most memory.
    """

    num_bytes: int
    by_kind: dict[str, int]
    largest: list[tuple[str, int, str]]


def peak_memory(
    module: Module, weights: Iterable[tuple[int, ...]], shards: int, rows: int
) -> PeakMemory:
    """Estimate the peak memory of a compiled step.

    Args:
        module: compiled module, whose instruction order is the schedule.
        weights: unsharded shapes of the parameters.
        shards: number of shards of each parameter.
        rows: images per chip; a tensor is an activation if one of its first two dimensions is a
            multiple of it.
    """
    entry = module.computations[module.entry]
    buffers = _result_buffers(entry, module)
    created: dict[Buffer, int] = {}
    last_use: dict[Buffer, int] = {}
    for i, instruction in enumerate(entry.values()):
        used = list(buffers[instruction.name])
        if instruction.opcode != "get-tuple-element":  # it uses one element of its operand only
            used += [element for name in instruction.operands for element in buffers.get(name, ())]
        for buffer in (buffer for element in used for buffer in element):
            created.setdefault(buffer, i)
            last_use[buffer] = i
    sizes = {buffer: _bytes_in_hbm(_shape(entry, buffer)) for buffer in created}
    changes: dict[int, int] = defaultdict(int)
    for buffer, begin in created.items():
        changes[begin] += sizes[buffer]
        changes[last_use[buffer] + 1] -= sizes[buffer]
    level, peak, peak_index = 0, 0, 0
    for i in sorted(changes):
        level += changes[i]
        if level > peak:
            peak, peak_index = level, i
    live = [buffer for buffer, begin in created.items() if begin <= peak_index <= last_use[buffer]]
    return _summarise(peak, entry, live, _weight_shapes(weights, shards), rows)


def _result_buffers(entry: Computation, module: Module) -> Mapping[str, ResultBuffers]:
    """Return the buffers of every instruction's result."""
    buffers: dict[str, ResultBuffers] = {}
    for name, instruction in entry.items():
        opcode, operands = instruction.opcode, instruction.operands
        own: ResultBuffers = [((name, i),) for i in range(len(instruction.shapes))]
        of_operands = [buffers.get(operand, []) for operand in operands]
        if opcode in _NO_BUFFER:
            own = [() for _ in own]
        elif opcode == "tuple":
            own = [_union(result) for result in of_operands]
        elif opcode == "get-tuple-element":
            index = int(instruction.attribute(r"index=(\d+)") or 0)
            elements = of_operands[0]
            own = [elements[index] if index < len(elements) else _union(elements)]
        elif opcode in _ALIASES:
            own = of_operands[0]
        elif opcode.endswith("-done") or opcode == "conditional":
            own = [_union([element for result in of_operands for element in result])]
        elif opcode.endswith("-start") and own and of_operands:
            own[0] = _union(of_operands[0])
        elif opcode == "dynamic-update-slice":
            own = of_operands[0]
        elif opcode == "fusion" and (target := _updated_in_place(instruction, module)) is not None:
            own = buffers[target] if any(buffers.get(target, ())) else own
        buffers[name] = own
    return buffers


def _union(result: ResultBuffers) -> tuple[Buffer, ...]:
    return tuple(dict.fromkeys(buffer for element in result for buffer in element))


def _updated_in_place(fusion: Instruction, module: Module) -> str | None:
    """Return the operand that a fusion updates in place (its root is the update), else None."""
    [body_name] = called_computations(fusion)[:1] or [""]
    body = module.computations.get(body_name, {})
    root = next((i for i in body.values() if i.is_root), None)
    while root is not None and root.opcode == "bitcast":
        root = body.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return None
    target = body.get(root.operands[0])
    while target is not None and target.opcode == "bitcast":
        target = body.get(target.operands[0])
    if target is None or target.opcode != "parameter":
        return None
    number = int(target.operand_text)
    return fusion.operands[number] if number < len(fusion.operands) else None


def _shape(entry: Computation, buffer: Buffer) -> Shape:
    name, index = buffer
    return entry[name].shapes[index]


def _bytes_in_hbm(shape: Shape) -> int:
    return 0 if shape.memory_space else shape.num_bytes


def _weight_shapes(weights: Iterable[tuple[int, ...]], shards: int) -> set[tuple[int, ...]]:
    """Return the shapes of weights, full, sharded and transposed, without dimensions of 1."""
    shapes = set()
    for weight in weights:
        parts = [
            (*weight[:i], size // shards, *weight[i + 1 :])
            for i, size in enumerate(weight)
            if size % shards == 0
        ]
        for shape in (weight, *parts):
            shapes |= {_without_ones(shape), _without_ones(shape[::-1])}
    return shapes


def _summarise(
    total: int,
    entry: Computation,
    live: list[Buffer],
    weights: set[tuple[int, ...]],
    rows: int,
) -> PeakMemory:
    kinds: dict[str, int] = defaultdict(int)
    by_shape: dict[tuple[str, str], int] = defaultdict(int)
    for buffer in live:
        shape, instruction = _shape(entry, buffer), entry[buffer[0]]
        size = _bytes_in_hbm(shape)
        if _without_ones(shape.dims) in weights:
            kind = "weights"
        elif any(dim % rows == 0 for dim in shape.dims[:2]):
            kind = "activations"
        else:
            kind = "other"
        kinds[kind] += size
        source = instruction.attribute(r'op_name="([^"]*)"') or instruction.opcode
        by_shape[f"{shape.dtype}{list(shape.dims)}", source.split(".")[0]] += size
    largest = sorted(by_shape.items(), key=lambda item: -item[1])
    sizes = {kind: size for kind, size in kinds.items() if size}
    return PeakMemory(total, sizes, [(shape, size, src) for (shape, src), size in largest[:20]])


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
