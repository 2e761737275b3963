"""The device mesh in torch_xla's terms, and the transfer of rows to meshes that share them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from numpy.typing import NDArray
from torch import Tensor

from rae_xla.runtime.mesh import AXES, BATCH, MeshShape
from rae_xla.runtime.xla import compat
from rae_xla.runtime.xla.pod import check_tensor_groups


def slice_count() -> int:
    """Return the number of slices that the devices of the run belong to."""
    return len({d.get("slice_index", 0) for d in xr.global_runtime_device_attributes()})


def make_device_mesh(shape: MeshShape, owners: Sequence[int]) -> xs.Mesh:
    """Return a mesh of the devices in the order of their numbers; of slices, by their links.

    The devices of a host are not numbered consecutively. With a ``tensor`` axis they are ordered by
    host, so that the devices of a tensor group are on one host if possible.

    Axes of one device are left out, because torch_xla 2.9 cannot send a vector to a mesh that has
    any.

    Args:
        shape: of the mesh.
        owners: process of each device, by the number of the device.

    Raises:
        UserError: a tensor group is on several hosts.
    """
    axes = [axis for axis in AXES if shape.axis_sizes[axis] > 1] or [BATCH[0]]
    if shape.slices > 1 and "slice_index" in xr.global_runtime_device_attributes()[0]:
        within = tuple(getattr(shape, axis) for axis in axes)
        across = tuple(shape.axis_sizes[axis] // getattr(shape, axis) for axis in axes)
        mesh: xs.Mesh = xs.HybridMesh(
            ici_mesh_shape=within, dcn_mesh_shape=across, axis_names=tuple(axes)
        )
    else:
        order = np.arange(shape.size)
        if shape.tensor > 1:
            order = np.argsort(np.asarray(owners), kind="stable")
        mesh = xs.Mesh(order, tuple(shape.axis_sizes[axis] for axis in axes), tuple(axes))
    if shape.tensor > 1:
        check_tensor_groups(_row_groups(mesh, shape, owners).tolist(), max(owners) + 1)
    return mesh


def _row_groups(mesh: xs.Mesh, shape: MeshShape, values: Sequence[int]) -> NDArray[np.int64]:
    """Arrange a value of each device by shard of the batch: (batch shards, tensor)."""
    devices = mesh.get_logical_mesh().reshape(shape.batch_shards, shape.tensor)
    return np.asarray(values)[devices]


class RowTransfer:
    """Sends this process's rows to its devices where several of them hold the same rows.

    ``xs.ShardingSpec(minibatch=True)`` fails for such meshes (pytorch/xla issue 8842).

    Args:
        mesh: of the run.
        shape: of the mesh.
        local_devices: numbers of this process's devices, in torch_xla's order.
    """

    def __init__(self, mesh: xs.Mesh, shape: MeshShape, local_devices: Sequence[int]) -> None:
        self._mesh = mesh
        groups = mesh.get_logical_mesh().reshape(shape.batch_shards, shape.tensor)
        shard_of = {
            device: shard for shard, group in enumerate(groups.tolist()) for device in group
        }
        own_shards = sorted({shard_of[device] for device in local_devices})
        self._parts = [own_shards.index(shard_of[device]) for device in local_devices]
        self._own, self._all = len(own_shards), shape.batch_shards

    def send(self, rows: Tensor, spec: tuple[object, ...]) -> Tensor:
        """Return the global tensor.

        Args:
            rows: of this process, in the order of its shards of the batch.
            spec: sharding of the global tensor, which splits it by rows only.
        """
        parts = rows.chunk(self._own)
        shards = [parts[part].contiguous() for part in self._parts]
        shape = (rows.shape[0] // self._own * self._all, *rows.shape[1:])
        return compat.tensor_from_shards(shards, self._mesh.get_op_sharding(spec), shape)
