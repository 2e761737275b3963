"""FLOPs of a traced step: its matrix products and convolutions, those computed twice too."""

from __future__ import annotations

import math

from rae_xla.plan.hlo import Instruction, Module, parse_shapes


def count_flops(module: Module) -> float:
    """FLOPs of one execution of a module that is not yet compiled; a multiply-add is 2.

    What a TPU's matrix units do not compute is left out.
    """
    total = 0.0
    for instruction, _, times in module.instructions():
        if instruction.opcode == "dot":
            total += times * _of_dot(instruction)
        elif instruction.opcode == "convolution":
            total += times * _of_convolution(instruction)
    return total


def _of_dot(instruction: Instruction) -> float:
    left = next(parse_shapes(instruction.operand_text))
    summed = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    length = math.prod(left.dims[int(i)] for i in summed.split(",") if i)
    return 2.0 * instruction.shapes[0].elements * length


def _of_convolution(instruction: Instruction) -> float:
    """Every weight but those of other outputs meets every output once."""
    _, kernel = list(parse_shapes(instruction.operand_text))[:2]
    labels = instruction.attribute(r"dim_labels=\w+_(\w+)->") or ""
    outputs = kernel.dims[labels.index("o")] if "o" in labels else 1
    return 2.0 * instruction.shapes[0].elements * kernel.elements / outputs
