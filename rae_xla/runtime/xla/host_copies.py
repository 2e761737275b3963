"""Copies of sharded XLA tensors on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor

from rae_xla.runtime.snapshot import HostShard, HostTensor
from rae_xla.runtime.xla import compat
from rae_xla.runtime.xla.compat import DeviceShard
from rae_xla.runtime.xla.spmd_mesh import Annotate

MAX_GATHERED_BYTES = 256 << 20
"""Bytes that ``gather_full`` holds on every device at a time."""

# Every function but ``gather_full`` copies the shards of this process's devices, which torch_xla
# allows only while the devices are idle.


def copy_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the rows on this process's devices, in the order of the global batch.

    Returns:
        Of every tensor the rows that this process has of all of them.
    """
    rows = [_rows_by_index(shards) for shards in _shards(tensors)]
    common = sorted(set.intersection(*map(set, rows)))
    return {
        name: torch.stack([found[index] for index in common])
        for name, found in zip(tensors, rows, strict=True)
    }


def copy_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy full tensors, in a run of one process, which has every shard."""
    found = zip(tensors.items(), _shards(tensors), strict=True)
    return {name: _assemble(tensor, shards) for (name, tensor), shards in found}


def gather_full(tensors: Mapping[str, Tensor], replicate: Annotate) -> dict[str, Tensor]:
    """Copy full tensors that the devices of several processes hold shards of.

    ``Tensor.cpu`` compiles a program for each sharded tensor, at every call. Annotated copies are
    gathered by one program for each set of shapes, which torch_xla caches.

    Args:
        tensors: the tensors; every process passes the same ones.
        replicate: annotates a copy as replicated.
    """
    found: dict[str, Tensor] = {}
    for names in _groups(tensors):
        copies = {name: replicate(tensors[name].detach()) for name in names}
        xm.unlazy(list(copies.values()))
        found |= {name: copy.cpu() for name, copy in copies.items()}
    return found


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors in groups of at most ``MAX_GATHERED_BYTES``, larger tensors alone."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > MAX_GATHERED_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    if group:
        yield group


def copy_first_replicas(tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
    """Copy the shards whose first replica, over all processes, is on a device of this one."""
    found = zip(tensors.items(), _shards(tensors), strict=True)
    return {
        name: HostTensor(tuple(tensor.shape), tuple(_first_replicas(tensor, shards)))
        for (name, tensor), shards in found
    }


def _shards(tensors: Mapping[str, Tensor]) -> list[list[DeviceShard]]:
    return compat.device_shards([tensor.detach() for tensor in tensors.values()])


def _rows_by_index(shards: Sequence[DeviceShard]) -> dict[int, Tensor]:
    """Rows by their index in the global tensor."""
    rows: dict[int, Tensor] = {}
    for shard in shards:
        start = 0 if shard.index is None else shard.index[0].start
        rows.update(enumerate(shard.data.unbind(), start))
    return rows


def _first_replicas(tensor: Tensor, shards: Sequence[DeviceShard]) -> Iterator[HostShard]:
    """First replicas among the shards, without padding."""
    for shard in shards:
        if shard.replica != 0:
            continue
        if shard.index is None:
            yield HostShard(shard.data, (0,) * tensor.dim())
            continue
        sizes = [place.stop - place.start for place in shard.index]
        if all(size > 0 for size in sizes):
            data = shard.data[tuple(slice(size) for size in sizes)]
            yield HostShard(data, tuple(place.start for place in shard.index))


def _assemble(tensor: Tensor, shards: Sequence[DeviceShard]) -> Tensor:
    """A full tensor from all of its shards."""
    if shards[0].index is None:
        return shards[0].data.clone()
    full = torch.empty(tensor.shape, dtype=shards[0].data.dtype)
    for shard in shards:
        target = full[shard.index]
        target.copy_(shard.data[tuple(slice(size) for size in target.shape)])  # without padding
    return full
