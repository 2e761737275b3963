"""Calls of attention kernels on each device's rows and heads.

The SPMD partitioner cannot split a kernel, so each device calls it on its own shards. Kernels are
written in jax, which lowers them to XLA computations; nothing is executed by jax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rae_xla.runtime.mesh import AXES, BATCH
from rae_xla.runtime.sharding import PartitionSpec, without_single_axes
from rae_xla.runtime.xla import compat
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh


def attention_spec(mesh: SpmdMesh) -> PartitionSpec:
    """Return the spec of attention's tensors: rows over the batch axes, heads over ``tensor``."""
    sizes = {axis: mesh.axis_sizes.get(axis, 1) for axis in AXES}
    return without_single_axes((BATCH, "tensor"), sizes)


def divides_evenly(tensor: Tensor, mesh: SpmdMesh) -> bool:
    """Return whether every device of ``mesh`` gets as many rows and heads of a tensor."""
    shards = map(mesh.shard_count, attention_spec(mesh))
    return all(size % count == 0 for size, count in zip(tensor.shape, shards, strict=False))


def call_on_shards(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    tables: Sequence[Tensor] = (),
    *,
    interpret: bool,
    **options: bool,
) -> list[Tensor]:
    """Call a jax function on each device's shards of ``tensors``, on torch_xla's global mesh.

    Args:
        function: takes an array for each tensor and each table, ``interpret`` and ``options``.
        tensors: (B, heads, ...).
        tables: tensors that every device needs entirely.
        interpret: run the arithmetic of the kernels on a CPU, for tests.
        options: further keyword arguments.

    Returns:
        The results, (B, heads, ...), sharded like the tensors.
    """
    from rae_xla.runtime.xla import jax_programs  # requires jax

    mesh = SpmdMesh.current()
    spec = attention_spec(mesh)
    if any(spec):
        tensors = [mesh.local_shards(tensor, spec) for tensor in tensors]
        tables = [mesh.local_shards(table, ()) for table in tables]
    tensors = [*tensors, *tables]
    computation = jax_programs.computation(function, tensors, interpret=interpret, **options)
    results = compat.call_computation("rae_xla::kernel", tensors, computation)
    return [mesh.global_tensor(result, spec) for result in results] if any(spec) else results
