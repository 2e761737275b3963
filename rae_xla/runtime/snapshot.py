"""Copies of the training state in host memory, ready to be written to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
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


Snapshot = Mapping[str, HostTensor]
"""Host tensors by name."""
