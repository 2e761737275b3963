"""A device mesh and the sharding annotations and collectives that the SPMD partitioner takes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor

from rae_xla.runtime.mesh import BATCH
from rae_xla.runtime.sharding import Entry, PartitionSpec, shard_count
from rae_xla.runtime.xla import compat

MAX_SCATTER_GROUP = 8
"""Devices of one reduce-scatter.

libtpu 0.0.21 compiles a reduce-scatter over 16 devices or more to an all-reduce, which sends twice
as many bytes. It does so over the eight of v5p:2x2x2, too, but not over those of v6e:2x4.
"""

Annotate = Callable[[Tensor], Tensor]
"""Return a copy of a tensor that is annotated with a sharding."""


class SpmdMesh:
    """The device mesh of a run, as its layers use it.

    Args:
        mesh: axes of one device are left out.

    Attributes:
        axis_sizes: devices along each axis.
        batch_axes: axes that the batch is split over.
        is_tracing: whether blocks are being traced on fake tensors, which have no data.
    """

    def __init__(self, mesh: xs.Mesh) -> None:
        self._mesh = mesh
        self.axis_sizes: dict[str, int] = dict(mesh.shape())
        self.batch_axes = tuple(axis for axis in BATCH if axis in self.axis_sizes)
        self.is_tracing = False

    @classmethod
    def current(cls) -> SpmdMesh:
        """Return torch_xla's global mesh, for custom operators: a graph cannot hold a mesh."""
        mesh = xs.get_global_mesh()
        assert mesh is not None, "XLABackend sets the global mesh"
        return cls(mesh)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Make annotations custom operators, which a graph of fake tensors can hold."""
        self.is_tracing = True
        try:
            yield
        finally:
            self.is_tracing = False

    def annotation(self, spec: PartitionSpec) -> Annotate:
        """Return the function that annotates tensors with ``spec``; missing entries are None."""
        op_shardings: dict[int, Any] = {}  # by number of dimensions

        def annotate(tensor: Tensor) -> Tensor:
            dimensions = tensor.dim()
            if self.is_tracing:
                result: Tensor = _annotate_sharding(tensor, repr(_padded(spec, dimensions)))
                return result
            if dimensions not in op_shardings:
                op_shardings[dimensions] = self._mesh.get_op_sharding(_padded(spec, dimensions))
            annotated = tensor.clone()
            compat.annotate_sharding(annotated, op_shardings[dimensions])
            return annotated

        return annotate

    def shard_count(self, entry: Entry) -> int:
        """Return the number of devices along the axis or axes of one entry of a spec."""
        return shard_count(entry, self.axis_sizes)

    def splits_rows_evenly(self, x: Tensor) -> bool:
        """Return whether every device has rows of ``x`` that no other has, all equally many."""
        shards = self.shard_count(self.batch_axes)
        return shards == self._mesh.size() and x.shape[0] % shards == 0

    def local_shards(self, tensor: Tensor, spec: PartitionSpec) -> Tensor:
        """Begin manual partitioning: return the shard of each device under ``spec``."""
        return compat.to_local_shards(self.annotation(spec)(tensor))

    def local_rows(self, tensor: Tensor) -> Tensor:
        """Begin manual partitioning: return the rows of each device."""
        return self.local_shards(tensor, (self.batch_axes,))

    def reduce_scatter(self, local: Tensor) -> Tensor:
        """Sum manual shards over all devices; ``fsdp`` shards the first dimension of the sum."""
        for groups in scatter_stages(self._groups("fsdp")):
            local = compat.reduce_scatter_shards(local, groups)
        if "data" in self.axis_sizes:
            local = compat.all_reduce_shards(local, self._groups("data"))
        return local

    def global_tensor(self, local: Tensor, spec: PartitionSpec) -> Tensor:
        """End manual partitioning: return the tensor whose shards under ``spec`` are given."""
        spec = _padded(spec, local.dim())
        shape = [
            size * self.shard_count(entry) for size, entry in zip(local.shape, spec, strict=True)
        ]
        return compat.to_global_tensor(local, self._mesh.get_op_sharding(spec), shape)

    def _groups(self, axis: str) -> list[list[int]]:
        """Groups of the devices that differ only in their position along one axis."""
        position = self._mesh.get_axis_name_idx(axis)
        devices = self._mesh.get_logical_mesh().swapaxes(position, -1)
        groups: list[list[int]] = devices.reshape(-1, devices.shape[-1]).tolist()
        return groups


def scatter_stages(groups: list[list[int]]) -> list[list[list[int]]]:
    """Split a reduce-scatter over many devices into several over at most ``MAX_SCATTER_GROUP``.

    One over 16 devices becomes one over devices that are 4 apart, and one over 4 neighbours. They
    send the same number of bytes, and every device gets the same share of the sum.

    Args:
        groups: devices of each reduce-scatter, in the order of their shares.

    Returns:
        The groups of each stage, in the order of execution.
    """
    size = len(groups[0])
    divisors = [d for d in range(2, MAX_SCATTER_GROUP + 1) if size % d == 0]
    if size <= MAX_SCATTER_GROUP or not divisors:
        return [groups]
    # about equal stages where two are enough
    factor = next((d for d in divisors if d * d >= size), divisors[-1])
    rest = size // factor
    strided = [group[offset::rest] for group in groups for offset in range(rest)]
    adjacent = [group[start : start + rest] for group in groups for start in range(0, size, rest)]
    return [strided, *scatter_stages(adjacent)]


def _padded(spec: PartitionSpec, dimensions: int) -> PartitionSpec:
    return spec + (None,) * (dimensions - len(spec))


@torch.library.custom_op("rae_xla::annotate_sharding", mutates_args=())
def _annotate_sharding(tensor: Tensor, spec: str) -> Tensor:
    mesh = xs.get_global_mesh()
    assert mesh is not None, "XLABackend sets the global mesh"
    annotated = tensor.clone()
    xs.annotate_custom_sharding(annotated, mesh, ast.literal_eval(spec))
    return annotated


@_annotate_sharding.register_fake
def _(tensor: Tensor, spec: str) -> Tensor:
    return torch.empty_like(tensor)


_annotate_sharding.register_autograd(lambda _, gradient: (gradient, None))


def annotated(tensor: Tensor, forward: Annotate, backward: Annotate) -> Tensor:
    """Annotate a tensor with ``forward`` and its gradient with ``backward``."""
    result: Tensor = _Annotated.apply(tensor, forward, backward)
    return result


class _Annotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Annotate, backward: Annotate) -> Tensor:
        ctx.annotate_gradient = backward
        return forward(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.annotate_gradient(gradient), None, None
