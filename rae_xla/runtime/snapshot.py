"""Copies of the training state in host memory, ready to be written to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HostShard:
    """A rectangular part of a tensor.

    Attributes:
        data: on the CPU; later updates on the devices do not change it.
        offsets: index of its first element in the full tensor, by dimension.
    """

    data: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class HostTensor:
    """The shards of a tensor that one process writes to a checkpoint.

    Attributes:
        shape: of the full tensor.
        shards: together with those of the other processes they cover the tensor. Empty if others
            write all of it. Several processes may hold the same shard; one of them writes it.
    """

    shape: tuple[int, ...]
    shards: tuple[HostShard, ...]

    @classmethod
    def full(cls, data: Tensor) -> HostTensor:
        """Return a tensor whose only shard is all of it, on the CPU."""
        return cls(tuple(data.shape), (HostShard(data, (0,) * data.dim()),))


@dataclass(frozen=True)
class HostPart:
    """The part of a tensor that a process needs: indices ``start`` to ``stop`` of one dimension."""

    dimension: int
    start: int
    stop: int

    def overlaps(self, offsets: Sequence[int], lengths: Sequence[int]) -> bool:
        """Return whether a rectangle, by its first index and size along each dimension, has any."""
        first, length = offsets[self.dimension], lengths[self.dimension]
        return first < self.stop and self.start < first + length


Snapshot = Mapping[str, HostTensor]
"""Host tensors by name."""
