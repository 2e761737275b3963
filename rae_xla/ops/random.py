"""Counter-based random numbers, which are the same on every device and in every batch split.

Every random number is a pure function of ``(seed, step, purpose, row, element)``, computed with
integer arithmetic that is identical on TPU, CUDA and CPU. Therefore the noise of a training run
does not depend on the number of devices, the backend, the batch split or a resume, and image ``i``
of a sampling run does not depend on the batch that contains it. ``torch.Generator`` has none of
these properties.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), the default of JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rae_xla.ops.eager_random import (
    PARITY,
    ROTATIONS,
    ROUND_GROUPS,
    Key,
    fill_normal,
    fill_uniform,
    fill_uniforms,
    runs_eagerly,
)


def _int32(value: int) -> int:
    """Return the signed 32-bit integer with the same low 32 bits as ``value``."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int32 to the right by 2 to 31 bits, filling with zeros (PyTorch copies the sign bit).

    Uses ``bitwise_right_shift`` because torch_xla 2.9 lowers ``>>`` to a division.
    """
    return torch.bitwise_right_shift(x, bits) & ((1 << (32 - bits)) - 1)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    """Rotate int32 to the left; the wrapping product is a left shift that torch_xla supports."""
    return (x * (1 << bits)) | _shift_right(x, 32 - bits)


def threefry(key: Key, counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the block function of Threefry-2x32-20.

    Args:
        key: two 32-bit halves, Python integers or int32 tensors that broadcast with the counter.
        counter: two int32 tensors that broadcast with each other.

    Returns:
        Two int32 tensors of 32 random bits each.
    """
    k0, k1 = key
    key_schedule = (k0, k1, k0 ^ k1 ^ PARITY)
    x0, x1 = counter[0] + k0, counter[1] + k1
    for group in range(ROUND_GROUPS):
        for bits in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, bits) ^ x0
        x0 = x0 + key_schedule[(group + 1) % 3]
        x1 = x1 + key_schedule[(group + 2) % 3] + (group + 1)
    return x0, x1


def _bits_to_uniform(bits: Tensor) -> Tensor:
    """Return float32 in [0, 1) from the upper 24 bits, the precision of a float32."""
    return _shift_right(bits, 8).to(torch.float32) * 2.0**-24


def _crc32_table() -> tuple[int, ...]:
    """Return the CRC-32 of every byte, without the inversions at both ends."""
    table = list(range(256))
    for _ in range(8):
        table = [(crc >> 1) ^ (0xEDB88320 if crc & 1 else 0) for crc in table]
    return tuple(table)


_CRC32_TABLE = _crc32_table()


def _purpose_id(purpose: str) -> int:
    """Return the CRC-32 of ``purpose``, as ``zlib.crc32`` computes it.

    torch.compile would break the graph at zlib. Marking a call of it as constant imports the
    compiler, 2 s of processor time in every command; this loop, torch.compile traces to a constant.
    """
    crc = 0xFFFFFFFF
    for byte in purpose.encode():
        crc = _CRC32_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True)
class CounterRNG:
    """Random numbers of one step, for each row of a batch.

    The ``purpose`` of its methods is an arbitrary text: different purposes give independent
    numbers, and the same purpose gives the same numbers again.

    Attributes:
        seed: seed of the run, of which the low 64 bits are used.
        step: 0-d int32 tensor, the training step or the sampler's step.
        rows: (B,) int32, the identity of each row of the batch: its index in the global batch in
            training, the index of the image in sampling. The random numbers get its device and
            its sharding.
    """

    seed: int
    step: Tensor
    rows: Tensor

    def _key(self, purpose: str) -> tuple[int, Tensor]:
        """Return the key of (seed, purpose, step)."""
        return _int32(self.seed ^ _purpose_id(purpose)), self.step ^ _int32(self.seed >> 32)

    def _bits(self, purpose: str, count: int) -> tuple[Tensor, Tensor]:
        """Return two int32 tensors (B, count): key (seed, purpose, step), counter (row, index)."""
        key = self._key(purpose)
        elements = torch.arange(count, dtype=torch.int32, device=self.rows.device)
        rows, elements = torch.broadcast_tensors(self.rows[:, None], elements[None])
        return threefry(key, (rows, elements))

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return (B, *shape) float32, uniform on [0, 1) in multiples of 2^-24."""
        count = math.prod(shape)
        if runs_eagerly(self.rows.device):
            fill_uniform(self._key(purpose), self.rows, out := self._empty(count))
            return out.view(-1, *shape)
        bits, _ = self._bits(purpose, count)
        return _bits_to_uniform(bits).reshape(-1, *shape)

    def uniforms(self, *purposes: str) -> tuple[Tensor, ...]:
        """Return ``uniform(purpose)``, (B,), for each purpose.

        Where operations run one by one, it takes as many of them as a single purpose.
        """
        if not runs_eagerly(self.rows.device):
            return tuple(self.uniform(purpose) for purpose in purposes)
        keys = [self._key(purpose)[0] for purpose in purposes]
        fill_uniforms(keys, self._key("")[1], self.rows, out := self._empty(len(purposes)))
        return out.unbind(1)

    def batch_uniform(self, purpose: str, count: int) -> Tensor:
        """Return (count,) float32, uniform on [0, 1), that do not depend on the rows."""
        first_row = replace(self, rows=self.step.reshape(1) * 0)
        return first_row.uniform(purpose, (count,))[0]

    def normal(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return (B, *shape) float32, standard normal by the Box-Muller transform (|z| < 5.9)."""
        count = math.prod(shape)
        if runs_eagerly(self.rows.device):
            fill_normal(self._key(purpose), self.rows, out := self._empty(count))
            return out.view(-1, *shape)
        first, second = self._bits(purpose, (count + 1) // 2)
        radius = torch.sqrt(-2.0 * torch.log(_bits_to_uniform(first) + 2.0**-25))
        angle = (2.0 * math.pi) * _bits_to_uniform(second)
        pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return pairs[:, :count].reshape(-1, *shape)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(len(self.rows), count, dtype=torch.float32, device=self.rows.device)
