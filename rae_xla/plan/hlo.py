"""The text of an XLA module, read as instructions, with how often each of them runs.

Only what a plan needs is read: results and operands, attributes as text, loops and their trip
counts. What one instruction computes is not.
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
    """One array: ``bf16[16,256,1152]``. ``memory_space`` 0 is HBM, others are on the chip."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Without the padding of tiles."""
        return math.ceil(self.elements * DTYPE_BITS[self.dtype] / 8)


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result_text: str
    operand_text: str
    attributes: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The result's arrays, several if it is a tuple."""
        return tuple(parse_shapes(self.result_text))

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(_OPERAND.findall(self.operand_text))

    def attribute(self, pattern: str) -> str | None:
        """What the first group of a pattern finds among the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclass
class Module:
    """Computations by name; instructions in their order, which is the schedule once compiled."""

    computations: dict[str, Computation]
    entry: str
    unknown_loops: list[str] = field(default_factory=list)

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one execution; a loop of unknown length counts once
        and is named in ``unknown_loops``. Computations of a reduction are not counted.
        """
        runs: dict[str, int] = defaultdict(int)
        self._count(self.entry, 1, runs)
        return dict(runs)

    def _count(self, name: str, times: int, runs: dict[str, int]) -> None:
        runs[name] += times
        for instruction in self.computations.get(name, {}).values():
            if instruction.opcode == "while":
                body = instruction.attribute(r"body=%?([\w.\-]+)") or ""
                trips = self._trips(instruction)
                if trips is None:
                    self.unknown_loops.append(instruction.name)
                self._count(body, times * (1 if trips is None else trips), runs)
            elif "=" in instruction.attributes:
                for called in called_computations(instruction):
                    self._count(called, times, runs)

    def _trips(self, loop: Instruction) -> int | None:
        """Trip count of ``for (i = start; i < limit; i += step)``, whose pieces the compiled text
        still has where XLA's own note of it is gone. None if it is no such loop.
        """
        if (known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"')) is not None:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]
        for test in condition.values():
            if test.opcode != "compare" or test.attribute(r"direction=(LT)") is None:
                continue
            counter, limit = (_behind_copies(condition, name) for name in test.operands)
            index = counter.attribute(r"index=(\d+)")
            stop = _constant(limit)
            if counter.opcode != "get-tuple-element" or index is None or stop is None:
                continue
            step = _step(body, int(index))
            if step:
                return math.ceil(stop / step)
        return None

    def instructions(self) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction that runs, its computation's name, and how often it runs."""
        for name, times in self.runs.items():
            for instruction in self.computations.get(name, {}).values():
                yield instruction, name, times

    def top_level(self) -> Iterator[tuple[Instruction, str, int]]:
        """The same without what lies inside fusions: what moves data to and from memory."""
        inside = {
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode == "fusion"
            for called in called_computations(instruction)
        }
        return (found for found in self.instructions() if found[1] not in inside)


def parse_shapes(text: str) -> Iterator[Shape]:
    """Every array in a shape's text, tuples taken apart."""
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        yield Shape(dtype, sizes, int(space[1]) if space else 0)


def called_computations(instruction: Instruction) -> list[str]:
    """What an instruction runs inside it: a fusion's body, a call's, the branches of a choice."""
    if instruction.opcode == "call":
        name = instruction.attribute(r"to_apply=%?([\w.\-]+)")
        return [name] if name else []
    found = _CALLED.search(instruction.attributes)
    return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []


def parse_module(text: str) -> Module:
    """Read the text of a module, compiled or not.

    Raises:
        ValueError: it has no entry computation.
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
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(line, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    return len(line)


def _behind_copies(computation: Computation, name: str) -> Instruction:
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    whole = instruction.opcode == "constant" and instruction.operand_text.lstrip("-").isdigit()
    return int(instruction.operand_text) if whole else None


def _step(body: Computation, index: int) -> int:
    """What a loop's body adds to element ``index`` of what it carries; 0 where that is not told."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    if root.opcode != "tuple" or index >= len(root.operands):
        return 0
    instruction, step = _behind_copies(body, root.operands[index]), 0
    while instruction.opcode == "add":
        terms = [_behind_copies(body, name) for name in instruction.operands]
        constants = [value for term in terms if (value := _constant(term)) is not None]
        if len(constants) != 1:
            return 0
        step += constants[0]
        instruction = next(term for term in terms if _constant(term) is None)
    return step if instruction.opcode == "get-tuple-element" else 0
