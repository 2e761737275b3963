"""Counter-based random numbers in few passes, where each operation runs by itself.

The numbers are those of ``random``. There, each operation makes a new tensor, which suits a
compiler: it fuses them. Without one, each operation reads and writes memory. Here they work in
place, and on a CPU on blocks that stay in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.ops.dispatch import requires_static_graph

Key = tuple[Tensor | int, Tensor | int]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA  # the key-schedule constant of Threefry-2x32
ROUND_GROUPS = 5  # five groups of four rounds

CPU_BLOCK = 1 << 15
"""Numbers of a block on a CPU: three int32 tensors of 128 kB each stay in a core's second cache."""


def runs_eagerly(device: torch.device) -> bool:
    """Return whether operations on a device run one by one: nothing is compiled or traced."""
    return not (torch.compiler.is_compiling() or requires_static_graph(device))


def fill_uniform(key: Key, rows: Tensor, out: Tensor) -> None:
    """Fill ``out`` with numbers that are uniform on [0, 1).

    Args:
        key: two 32-bit halves.
        rows: (B,) int32, the first half of the counters; the second is the column.
        out: (B, n) float32.
    """
    for place, first, _, _ in _blocks(key, rows, out.shape[1]):
        _to_uniform(first, out[place])


def fill_uniforms(keys: Sequence[int], second_half: Tensor, rows: Tensor, out: Tensor) -> None:
    """Fill each column of ``out`` with the first number of each row for another key.

    Args:
        keys: first half of the key of each column.
        second_half: second half of all keys, 0-d int32.
        rows: (B,) int32, the first half of the counters.
        out: (B, keys) float32.
    """
    columns = torch.arange(len(keys), device=rows.device)
    first_half = torch.full_like(columns, keys[0], dtype=torch.int32)
    for column, key in enumerate(keys[1:], start=1):
        first_half.masked_fill_(columns == column, key)
    x0 = rows[:, None].repeat(1, len(keys))
    x1 = torch.zeros_like(x0)
    threefry_((first_half, second_half), x0, x1, torch.empty_like(x0), _rotations())
    _to_uniform(x0, out)


def fill_normal(key: Key, rows: Tensor, out: Tensor) -> None:
    """Fill ``out`` with standard normal numbers by the Box-Muller transform.

    Column i and column i + n / 2, rounded up, are a pair.

    Args:
        key: as for ``fill_uniform``.
        rows: likewise.
        out: (B, n) float32.
    """
    count = out.shape[1]
    half = (count + 1) // 2
    for (block_rows, columns), first, second, scratch in _blocks(key, rows, half):
        radius, angle = scratch.view(torch.float32), torch.empty_like(first, dtype=torch.float32)
        _to_uniform(second, angle)
        _to_uniform(first, radius)
        radius.add_(2.0**-25).log_().mul_(-2.0).sqrt_()
        angle.mul_(2.0 * math.pi)
        torch.mul(torch.cos(angle), radius, out=out[block_rows, columns])
        paired = slice(columns.start + half, min(columns.stop + half, count))
        width = paired.stop - paired.start
        torch.mul(angle.sin_()[:, :width], radius[:, :width], out=out[block_rows, paired])


def _blocks(
    key: Key, rows: Tensor, columns: int
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor]]:
    """Yield the random bits of one block of rows and columns after another.

    Yields:
        The block, two int32 tensors of its shape with 32 random bits each, and a third that may be
        overwritten.
    """
    elements = torch.arange(columns, dtype=torch.int32, device=rows.device)
    rotations = _rotations()
    for place in _places(len(rows), columns, rows.device):
        counters = torch.broadcast_tensors(rows[place[0], None], elements[None, place[1]])
        first, second = (c.clone(memory_format=torch.contiguous_format) for c in counters)
        scratch = torch.empty_like(first)
        threefry_(key, first, second, scratch, rotations)
        yield place, first, second, scratch


def _places(rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks that numbers are computed in: all at once, except on a CPU."""
    if device.type != "cpu":
        yield slice(0, rows), slice(0, columns)
        return
    width = max(1, min(columns, CPU_BLOCK))
    height = CPU_BLOCK // width
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, columns))


@dataclass(frozen=True)
class _Rotation:
    """The constants of a rotation to the left.

    Two of them are 0-d tensors on the CPU, because PyTorch converts a Python integer more slowly
    than it combines a block of numbers with it. On an accelerator they are arguments of kernels.
    """

    factor: int
    shift: Tensor
    mask: Tensor

    @classmethod
    def by(cls, bits: int) -> _Rotation:
        shift, mask = (torch.tensor(n, dtype=torch.int32) for n in (32 - bits, (1 << bits) - 1))
        return cls(1 << bits, shift, mask)


def _rotations() -> list[list[_Rotation]]:
    return [[_Rotation.by(bits) for bits in group] for group in ROTATIONS]


def threefry_(
    key: Key, x0: Tensor, x1: Tensor, scratch: Tensor, rotations: Sequence[Sequence[_Rotation]]
) -> None:
    """Replace counters by random bits in place; the same function as ``random.threefry``.

    Args:
        key: two 32-bit halves, Python integers or int32 tensors that broadcast to the counters.
        x0: int32, first half of the counters.
        x1: int32, second half.
        scratch: int32 of the same shape; it is overwritten.
        rotations: those of ``ROTATIONS``.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x0.add_(schedule[0])
    x1.add_(schedule[1])
    for group in range(ROUND_GROUPS):
        for rotation in rotations[group % 2]:
            x0.add_(x1)
            # x1 rotated: the bits that leave it on the left, and the others moved by a wrapping
            # product, of which the low bits are zero.
            torch.bitwise_right_shift(x1, rotation.shift, out=scratch)
            scratch.bitwise_and_(rotation.mask)
            scratch.add_(x1, alpha=rotation.factor)
            torch.bitwise_xor(scratch, x0, out=x1)
        x0.add_(schedule[(group + 1) % 3])
        x1.add_(schedule[(group + 2) % 3] + (group + 1))


def _to_uniform(bits: Tensor, out: Tensor) -> None:
    """Write float32 in [0, 1) from the upper 24 bits to ``out``; changes ``bits``."""
    bits.bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)
    torch.mul(bits, 2.0**-24, out=out)
