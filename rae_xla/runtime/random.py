"""Random numbers that depend on what they are for, and on nothing else.

Every draw is a pure function of ``(seed, step, purpose, row, element)``, computed with integer
arithmetic that is the same on TPU, CUDA and CPU. So a run draws the same noise on one device or on
a thousand, on any backend, in any batch split, before and after a resume; and image ``i`` of a
sampling run is the same image whatever batch it falls into.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), the default of JAX.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # the key-schedule constant of Threefry-2x32
_ROUND_GROUPS = 5  # five groups of four rounds


def _int32(value: int) -> int:
    """The signed 32-bit integer with the same low 32 bits."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 by 2 to 31 bits (torch's own copies the sign bit).

    Written with ``bitwise_right_shift`` because torch_xla 2.9 lowers ``>>`` to a division.
    """
    return torch.bitwise_right_shift(x, bits) & ((1 << (32 - bits)) - 1)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    """Rotate int32 words; the product wraps, and is a left shift torch_xla gets right."""
    return (x * (1 << bits)) | _shift_right(x, 32 - bits)


def threefry(
    key: tuple[Tensor | int, Tensor | int], counter: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20.

    Args:
        key: two int32 words, Python integers or tensors that broadcast with the counter.
        counter: two int32 tensors that broadcast together.

    Returns:
        Two int32 tensors of 32 random bits each.
    """
    k0, k1 = key
    words = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = counter[0] + k0, counter[1] + k1
    for group in range(_ROUND_GROUPS):
        for bits in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, bits) ^ x0
        x0 = x0 + words[(group + 1) % 3]
        x1 = x1 + words[(group + 2) % 3] + (group + 1)
    return x0, x1


def _unit(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from the upper 24 bits, all a float32 holds."""
    return _shift_right(bits, 8).to(torch.float32) * 2.0**-24


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _number_of(purpose: str) -> int:
    """A 32-bit number for a word; torch.compile cannot look into zlib, and would cut the graph."""
    return zlib.crc32(purpose.encode())


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, row by row.

    Attributes:
        seed: the run's seed, any Python integer; the low 64 bits count.
        step: 0-d int32 tensor, the training step (or the sampler's step).
        rows: (B,) int32, what each row of the batch is: its place in the global batch when
            training, the image's number when sampling. Its device and sharding become those of
            the draws.
    """

    seed: int
    step: Tensor
    rows: Tensor

    def _bits(self, purpose: str, count: int) -> tuple[Tensor, Tensor]:
        """Two int32 tensors (B, count): the key is (seed, purpose, step), the counter the place."""
        key = _int32(self.seed ^ _number_of(purpose)), self.step ^ _int32(self.seed >> 32)
        elements = torch.arange(count, dtype=torch.int32, device=self.rows.device)
        rows, elements = torch.broadcast_tensors(self.rows[:, None], elements[None])
        return threefry(key, (rows, elements))

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) float32, uniform on [0, 1) in steps of 2^-24."""
        bits, _ = self._bits(purpose, math.prod(shape))
        return _unit(bits).reshape(-1, *shape)

    def once(self, purpose: str, count: int) -> Tensor:
        """(count,) float32, uniform on [0, 1): the same for the whole batch."""
        key = replace(self, rows=self.step.reshape(1) * 0)
        return key.uniform(purpose, (count,))[0]

    def normal(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) float32, standard normal, by the Box-Muller transform (|z| < 5.9)."""
        count = math.prod(shape)
        first, second = self._bits(purpose, (count + 1) // 2)
        radius = torch.sqrt(-2.0 * torch.log(_unit(first) + 2.0**-25))
        angle = (2.0 * math.pi) * _unit(second)
        pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return pairs[:, :count].reshape(-1, *shape)
