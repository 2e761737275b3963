"""What a compiled step moves to and from a chip's memory, operation by operation.

Each operation reads its operands and writes its result once; a slice reads, and an update in place
writes, only its own part. That is a model, close to XLA's own count (``bytes accessed``) but with
loops multiplied out and without what stays on the chip, where the compiler says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from rae_xla.plan.hlo import Computation, Instruction, Module, called_computations

# Move no data, or are counted where they start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "partition-id", "replica-id", "after-all", "call", "opt-barrier", "iota", "add-dependency",
}  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """Operations of one kind: same shape, same origin in the model.

    Attributes:
        operation: what it is called.
        shapes: of its result.
        source: the operation of the model it was made from.
        times: how often it runs in a step.
        num_bytes: that all of them together move.
    """

    operation: str
    shapes: str
    source: str
    times: int
    num_bytes: int


def memory_traffic(module: Module) -> list[Traffic]:
    """The operations that move data in HBM, the largest movers first."""
    moved: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for instruction, where, times in module.top_level():
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        size = _bytes_moved(instruction, module.computations[where], module)
        shapes = " ".join(f"{s.dtype}{list(s.dims)}" for s in instruction.shapes)
        name = re.sub(r"(\.(clone|sunk|remat))*[.\d]*$", "", instruction.name)
        entry = moved[name, shapes, _source(instruction)]
        entry[0] += times
        entry[1] += times * size
    rows = [Traffic(*key, times, size) for key, (times, size) in moved.items()]
    return sorted(rows, key=lambda row: -row.num_bytes)


def _source(instruction: Instruction) -> str:
    name = instruction.attribute(r'op_name="([^"]*)"') or ""
    return re.sub(r"\.\d+", "", name)


def _bytes_moved(instruction: Instruction, computation: Computation, module: Module) -> int:
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
    """What is read of a value that is only ever cut, in a fusion within if need be; else None."""
    total = 0
    for user in body.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            part: int | None = _hbm_bytes(user)
        elif user.opcode == "bitcast":
            part = _bytes_of_slices(user.name, body, module)
        elif user.opcode == "fusion":
            within = module.computations[called_computations(user)[0]]
            own = _parameters(within)[user.operands.index(name)]
            part = _bytes_of_slices(own.name, within, module)
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
