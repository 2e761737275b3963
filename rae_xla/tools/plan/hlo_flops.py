"""FLOPs of a traced step, recomputation included, from its HLO."""

from __future__ import annotations

import math

from rae_xla.tools.plan.hlo import Computation, Instruction, Module, parse_shapes

_KERNELS = {
    "splash_mha_fwd": (2, -2),
    "splash_mha_dkv": (5, -2),
    "whole_attention_fwd": (2, -1),
    "whole_attention_bwd": (5, -1),
}
"""Matrix products of one head in each kernel of ``runtime.xla.flash_kernels`` and
``runtime.xla.whole_kernels``, and the axis of the tokens in its results.
"""


def hlo_flops(module: Module, chips: int = 1) -> float:
    """Return the FLOPs of one execution of a module, over all chips.

    Matrix products, convolutions and attention kernels are counted: all that a TPU's matrix units
    compute. A multiply-add counts as 2.

    Args:
        module: before compilation, that is before partitioning over chips.
        chips: number of chips; instructions that the model partitions itself, and kernels, have
            their shapes on one chip and are multiplied by it.
    """
    total = 0.0
    manual = {name: _manually_sharded(body) for name, body in module.computations.items()}
    for instruction, where, count in module.instructions():
        copies = chips if instruction.name in manual[where] else 1
        if instruction.opcode == "dot":
            total += count * copies * _dot_flops(instruction)
        elif instruction.opcode == "convolution":
            total += count * copies * _convolution_flops(instruction)
        elif instruction.attribute(r'target="(tpu_custom_call)"') is not None:
            total += count * chips * _kernel_flops(instruction)
    return total


def _manually_sharded(computation: Computation) -> set[str]:
    """Return the instructions between SPMDFullToShardShape and SPMDShardToFullShape."""
    found: set[str] = set()
    for instruction in computation.values():
        target = instruction.attribute(r'custom_call_target="(\w+)"')
        if target == "SPMDFullToShardShape" or (
            target != "SPMDShardToFullShape" and not found.isdisjoint(instruction.operands)
        ):
            found.add(instruction.name)
    return found


def _kernel_flops(instruction: Instruction) -> float:
    # The last bf16 result has the shape of the queries, (B, heads, N, d) or (B, heads, d, N).
    *_, like_queries = (shape for shape in instruction.shapes if shape.dtype == "bf16")
    products, tokens = _KERNELS[instruction.attribute(f"({'|'.join(_KERNELS)})") or ""]
    return products * 2.0 * like_queries.elements * like_queries.dims[tokens]


def _dot_flops(instruction: Instruction) -> float:
    left = next(parse_shapes(instruction.operand_text))
    summed = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    length = math.prod(left.dims[int(i)] for i in summed.split(",") if i)
    return 2.0 * instruction.shapes[0].elements * length


def _convolution_flops(instruction: Instruction) -> float:
    # Each output element takes one multiply-add per weight of its output channel.
    _, kernel = list(parse_shapes(instruction.operand_text))[:2]
    labels = instruction.attribute(r"dim_labels=\w+_(\w+)->") or ""
    outputs = kernel.dims[labels.index("o")] if "o" in labels else 1
    return 2.0 * instruction.shapes[0].elements * kernel.elements / outputs
