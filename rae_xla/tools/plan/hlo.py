"""Parser of XLA module text (HLO): instructions, and how often each of them is executed.

It reads only what a plan needs: results and operands, attributes as text, and loops with their trip
counts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip

_SHAPE = re.compile(r"\b(" + "|".join(DTYPE_BITS) + r")\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_NAME = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)


@dataclass(frozen=True)
class Shape:
    """Shape of an array, such as ``bf16[16,256,1152]``.

    Attributes:
        dtype: as XLA writes it.
        dims: sizes of the dimensions.
        memory_space: 0 is HBM, others are on-chip memory.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes, without the padding of tiles."""
        return math.ceil(self.elements * DTYPE_BITS[self.dtype] / 8)


@dataclass
class Instruction:
    """One instruction of a computation, with the parts of its line as text."""

    name: str
    opcode: str
    result_text: str
    operand_text: str
    attributes: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the result, several if it is a tuple."""
        return tuple(parse_shapes(self.result_text))

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(_OPERAND.findall(self.operand_text))

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of a regular expression in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclass
class Module:
    """Computations by name. Instructions keep their order: the schedule, once compiled."""

    computations: dict[str, Computation]
    entry: str
    unknown_loops: list[str] = field(default_factory=list)

    @cached_property
    def execution_counts(self) -> dict[str, int]:
        """Executions of each computation per execution of the module.

        A loop of unknown length counts once and is added to ``unknown_loops``. The computations of
        reductions are not counted.
        """
        counts: dict[str, int] = defaultdict(int)
        self._count(self.entry, 1, counts)
        return dict(counts)

    def _count(self, name: str, count: int, counts: dict[str, int]) -> None:
        counts[name] += count
        for instruction in self.computations.get(name, {}).values():
            if instruction.opcode == "while":
                body = instruction.attribute(r"body=%?([\w.\-]+)") or ""
                trips = self._trip_count(instruction)
                if trips is None:
                    self.unknown_loops.append(instruction.name)
                self._count(body, count * (1 if trips is None else trips), counts)
            elif "=" in instruction.attributes:
                for called in called_computations(instruction):
                    self._count(called, count, counts)

    def _trip_count(self, loop: Instruction) -> int | None:
        """Return the trip count of a loop ``for (i = 0; i < limit; i += step)``, else None.

        XLA's annotation is used if it exists; otherwise limit and step are read from the loop's
        condition and body.
        """
        if (known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"')) is not None:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]
        for test in condition.values():
            if test.opcode != "compare" or test.attribute(r"direction=(LT)") is None:
                continue
            counter, limit = (_skip_copies(condition, name) for name in test.operands)
            index = counter.attribute(r"index=(\d+)")
            stop = _constant(limit)
            if counter.opcode != "get-tuple-element" or index is None or stop is None:
                continue
            step = _increment(body, int(index))
            if step:
                return math.ceil(stop / step)
        return None

    def instructions(self) -> Iterator[tuple[Instruction, str, int]]:
        """Yield (instruction, name of its computation, executions) of all that is executed."""
        for name, count in self.execution_counts.items():
            for instruction in self.computations.get(name, {}).values():
                yield instruction, name, count

    def top_level(self) -> Iterator[tuple[Instruction, str, int]]:
        """Like ``instructions`` without the bodies of fusions: all that accesses memory."""
        inside = {
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode == "fusion"
            for called in called_computations(instruction)
        }
        return (found for found in self.instructions() if found[1] not in inside)


def parse_shapes(text: str) -> Iterator[Shape]:
    """Yield every array in the text of a shape; a tuple yields its elements."""
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        yield Shape(dtype, sizes, int(space[1]) if space else 0)


def called_computations(instruction: Instruction) -> list[str]:
    """Return the computations that an instruction executes: of a fusion, call or conditional."""
    if instruction.opcode == "call":
        name = instruction.attribute(r"to_apply=%?([\w.\-]+)")
        return [name] if name else []
    found = _CALLED.search(instruction.attributes)
    return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []


def parse_module(text: str) -> Module:
    """Parse the text of a module, compiled or not.

    Raises:
        ValueError: if it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and (head := _COMPUTATION.match(line)):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif (instruction := _parse_line(line)) is not None:
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of this XLA module has no ENTRY computation")
    return Module(computations, entry)


def _parse_line(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        result_text=line[start:end],
        operand_text=line[opcode.end() : close],
        attributes=line[close + 1 :],
        is_root=head[1] is not None,
    )


def _closing(line: str, start: int) -> int:
    """Return the index of the bracket that closes the one at ``start``."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(line, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    return len(line)


def _skip_copies(computation: Computation, name: str) -> Instruction:
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    is_integer = instruction.opcode == "constant" and instruction.operand_text.lstrip("-").isdigit()
    return int(instruction.operand_text) if is_integer else None


def _increment(body: Computation, index: int) -> int:
    """Return what a loop body adds to element ``index`` of its state; 0 if that is unknown."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    if root.opcode != "tuple" or index >= len(root.operands):
        return 0
    instruction, step = _skip_copies(body, root.operands[index]), 0
    while instruction.opcode == "add":
        terms = [_skip_copies(body, name) for name in instruction.operands]
        constants = [value for term in terms if (value := _constant(term)) is not None]
        if len(constants) != 1:
            return 0
        step += constants[0]
        instruction = next(term for term in terms if _constant(term) is None)
    return step if instruction.opcode == "get-tuple-element" else 0
