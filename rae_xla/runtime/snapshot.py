"""The state of a run on its way to a checkpoint: this process's part of it, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HostShard:
    """A box cut out of a tensor.

    Attributes:
        data: on the CPU; nothing on the devices can change it any more.
        offsets: where its first element lies in the whole tensor, by dimension.
    """

    data: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class HostTensor:
    """What this process is to write of a tensor.

    Attributes:
        shape: of the whole tensor.
        shards: the boxes; with those of the other processes they cover it. None, where others
            write all of it. Several processes may hold the same box: one of them writes it.
    """

    shape: tuple[int, ...]
    shards: tuple[HostShard, ...]

    @classmethod
    def whole(cls, data: Tensor) -> HostTensor:
        """A tensor that this process has all of, on the CPU."""
        return cls(tuple(data.shape), (HostShard(data, (0,) * data.dim()),))


Snapshot = Mapping[str, HostTensor]
