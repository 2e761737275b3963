"""HBM traffic of a compiled step: bytes that each operation reads and writes.

The model: each operation reads its operands and writes its result once; a slice reads, and an
in-place update writes, only its own part. It is close to XLA's ``bytes accessed``, but counts every
iteration of a loop, and leaves out results that the compiler places in on-chip memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from rae_xla.tools.plan.hlo import Computation, Instruction, Module, called_computations

# Opcodes that move no data, or are counted at their start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "partition-id", "replica-id", "after-all", "call", "opt-barrier", "iota", "add-dependency",
}  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """Traffic of all operations with the same name, shape and source.

    Attributes:
        operation: name of the operation.
        shapes: shapes of its result.
        source: operation of the model that it was compiled from.
        count: executions per step.
        num_bytes: bytes read and written per step, over all executions.
    """

    operation: str
    shapes: str
    source: str
    count: int
    num_bytes: int


def memory_traffic(module: Module) -> list[Traffic]:
    """Return the operations that access HBM, by descending traffic."""
    totals: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for instruction, where, count in module.top_level():
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        size = _bytes_accessed(instruction, module.computations[where], module)
        shapes = " ".join(f"{s.dtype}{list(s.dims)}" for s in instruction.shapes)
        name = re.sub(r"(\.(clone|sunk|remat))*[.\d]*$", "", instruction.name)
        entry = totals[name, shapes, _source(instruction)]
        entry[0] += count
        entry[1] += count * size
    rows = [Traffic(*key, count, size) for key, (count, size) in totals.items()]
    return sorted(rows, key=lambda row: -row.num_bytes)


def _source(instruction: Instruction) -> str:
    name = instruction.attribute(r'op_name="([^"]*)"') or ""
    return re.sub(r"\.\d+", "", name)


def _bytes_accessed(instruction: Instruction, computation: Computation, module: Module) -> int:
    written = _hbm_bytes(instruction)
    sizes = [_hbm_bytes(computation[name]) if name in computation else 0
             for name in instruction.operands]  # fmt: skip
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if instruction.opcode != "fusion":
        return written + sum(sizes)
    [body_name] = called_computations(instruction)[:1] or [""]
    body = module.computations.get(body_name, {})
    for i, parameter in _parameters(body).items():
        if i >= len(sizes):
            continue
        users = [user for user in body.values() if parameter.name in user.operands]
        if users and all(_updates(user, parameter) for user in users):
            part = sum(_hbm_bytes(body[user.operands[1]]) for user in users)
            written -= sizes[i] - min(sizes[i], part)
            sizes[i] = 0
        elif (parts := _bytes_of_slices(parameter.name, body, module)) is not None:
            sizes[i] = min(sizes[i], parts)
    return max(written, 0) + sum(sizes)


def _bytes_of_slices(name: str, body: Computation, module: Module) -> int | None:
    """Return the bytes read of a value that is only sliced, also in nested fusions; else None."""
    total = 0
    for user in body.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            part: int | None = _hbm_bytes(user)
        elif user.opcode == "bitcast":
            part = _bytes_of_slices(user.name, body, module)
        elif user.opcode == "fusion":
            nested = module.computations[called_computations(user)[0]]
            parameter = _parameters(nested)[user.operands.index(name)]
            part = _bytes_of_slices(parameter.name, nested, module)
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _updates(user: Instruction, target: Instruction) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[:1] == (target.name,)


def _parameters(body: Computation) -> dict[int, Instruction]:
    return {
        int(instruction.operand_text): instruction
        for instruction in body.values()
        if instruction.opcode == "parameter"
    }


def _hbm_bytes(instruction: Instruction) -> int:
    return sum(shape.num_bytes for shape in instruction.shapes if shape.memory_space == 0)
