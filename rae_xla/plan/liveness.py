"""What fills a chip's memory when it is fullest, read from the schedule of a compiled step.

A model of the compiler's own assignment of buffers: every result lives from where it is made to
its last use, results that are written in place share one buffer, padding is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rae_xla.plan.hlo import Computation, Instruction, Module, Shape, called_computations

_NO_BUFFER = {"parameter", "constant", "iota", "partition-id", "replica-id", "after-all"}
# Their result is their first operand under another name, element by element.
_SAME = {"bitcast", "while", "opt-barrier", "optimization-barrier", "add-dependency"}

Buffer = tuple[str, int]
"""The instruction that makes it, and which of its results it is."""
Places = list[tuple[Buffer, ...]]
"""For each element of an instruction's result the buffers it lies in."""


@dataclass(frozen=True)
class Peak:
    """The fullest moment.

    Attributes:
        num_bytes: of all buffers that are not arguments.
        by_kind: ``activations``, ``weights`` (gathered, and their gradients) and ``other``.
        largest: shape and total bytes of the shapes that take most, and what made them.
    """

    num_bytes: int
    by_kind: dict[str, int]
    largest: list[tuple[str, int, str]]


def peak_memory(module: Module, weights: Iterable[tuple[int, ...]], shards: int, rows: int) -> Peak:
    """Find the fullest moment of a compiled step.

    Args:
        module: compiled, so that the order of its instructions is the schedule.
        weights: shapes of the parameters, whole.
        shards: parts they are split into.
        rows: images of a chip: what has them as one of its first dimensions is an activation.
    """
    entry = module.computations[module.entry]
    places = _places(entry, module)
    made: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for i, instruction in enumerate(entry.values()):
        touched = list(places[instruction.name])
        if instruction.opcode != "get-tuple-element":  # which touches its element alone
            touched += [place for name in instruction.operands for place in places.get(name, ())]
        for buffer in (buffer for place in touched for buffer in place):
            made.setdefault(buffer, i)
            last[buffer] = i
    sizes = {buffer: _bytes_in_hbm(_shape(entry, buffer)) for buffer in made}
    changes: dict[int, int] = defaultdict(int)
    for buffer, begin in made.items():
        changes[begin] += sizes[buffer]
        changes[last[buffer] + 1] -= sizes[buffer]
    level, most, moment = 0, 0, 0
    for i in sorted(changes):
        level += changes[i]
        if level > most:
            most, moment = level, i
    alive = [buffer for buffer, begin in made.items() if begin <= moment <= last[buffer]]
    return _describe(most, entry, alive, _as_stored(weights, shards), rows)


def _places(entry: Computation, module: Module) -> Mapping[str, Places]:
    """Where the results of every instruction lie."""
    places: dict[str, Places] = {}
    for name, instruction in entry.items():
        opcode, operands = instruction.opcode, instruction.operands
        own: Places = [((name, i),) for i in range(len(instruction.shapes))]
        of_operands = [places.get(operand, []) for operand in operands]
        if opcode in _NO_BUFFER:
            own = [() for _ in own]
        elif opcode == "tuple":
            own = [_all(place) for place in of_operands]
        elif opcode == "get-tuple-element":
            index = int(instruction.attribute(r"index=(\d+)") or 0)
            whole = of_operands[0]
            own = [whole[index] if index < len(whole) else _all(whole)]
        elif opcode in _SAME:
            own = of_operands[0]
        elif opcode.endswith("-done") or opcode == "conditional":
            own = [_all([buffers for place in of_operands for buffers in place])]
        elif opcode.endswith("-start") and own and of_operands:
            own[0] = _all(of_operands[0])
        elif opcode == "dynamic-update-slice":
            own = of_operands[0]
        elif opcode == "fusion" and (target := _updated_in_place(instruction, module)) is not None:
            own = places[target] if any(places.get(target, ())) else own
        places[name] = own
    return places


def _all(places: Places) -> tuple[Buffer, ...]:
    return tuple(dict.fromkeys(buffer for place in places for buffer in place))


def _updated_in_place(fusion: Instruction, module: Module) -> str | None:
    """The operand a fusion writes a part of, if that is all it does."""
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


def _as_stored(weights: Iterable[tuple[int, ...]], shards: int) -> set[tuple[int, ...]]:
    """The shapes of weights, whole, split and transposed, without dimensions of 1."""
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


def _describe(
    total: int,
    entry: Computation,
    alive: list[Buffer],
    weights: set[tuple[int, ...]],
    rows: int,
) -> Peak:
    kinds: dict[str, int] = defaultdict(int)
    by_shape: dict[tuple[str, str], int] = defaultdict(int)
    for buffer in alive:
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
    return Peak(total, sizes, [(shape, size, src) for (shape, src), size in largest[:20]])


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
