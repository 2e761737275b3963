"""FLOPs of a traced step: its matrix products and convolutions, those computed twice too."""

from __future__ import annotations

import math

from rae_xla.plan.hlo import Computation, Instruction, Module, parse_shapes

_PRODUCTS = {"fwd": 2, "dkv": 5}
"""Of (N, d) matrices in the kernels of ``runtime.xla_flash``, each with an (N, N) one between."""


def count_flops(module: Module, chips: int = 1) -> float:
    """FLOPs of one execution of a module that is not yet compiled; a multiply-add is 2.

    What a TPU's matrix units do not compute is left out. Kernels are told as they are on each of
    ``chips``, and so is what the model itself splits over them.
    """
    total = 0.0
    split = {name: _on_each_chip(body) for name, body in module.computations.items()}
    for instruction, where, times in module.instructions():
        alike = chips if instruction.name in split[where] else 1
        if instruction.opcode == "dot":
            total += times * alike * _of_dot(instruction)
        elif instruction.opcode == "convolution":
            total += times * alike * _of_convolution(instruction)
        elif instruction.attribute(r'target="(tpu_custom_call)"') is not None:
            total += times * chips * _of_kernel(instruction)
    return total


def _on_each_chip(computation: Computation) -> set[str]:
    """What lies between the partitioner's hands: from a tensor's parts to what is whole again."""
    found: set[str] = set()
    for instruction in computation.values():
        target = instruction.attribute(r'custom_call_target="(\w+)"')
        if target == "SPMDFullToShardShape" or (
            target != "SPMDShardToFullShape" and not found.isdisjoint(instruction.operands)
        ):
            found.add(instruction.name)
    return found


def _of_kernel(instruction: Instruction) -> float:
    """The last result in bf16 is (B, heads, N, d), as the queries are."""
    *_, like_queries = (shape for shape in instruction.shapes if shape.dtype == "bf16")
    products = _PRODUCTS[instruction.attribute(r"splash_mha_(fwd|dkv)") or ""]
    return products * 2.0 * like_queries.elements * like_queries.dims[-2]


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
