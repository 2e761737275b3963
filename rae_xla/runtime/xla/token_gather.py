"""Selection of tokens on the devices that hold their rows.

The SPMD partitioner does not recognise that ``gather`` and the ``scatter`` of its gradient stay
within a row: it sums the gradients of the global batch over all devices. Here each device selects
from its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor

from rae_xla.ops import dispatch
from rae_xla.ops.gather import expand_index, gather_rows
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh


def gather_tokens_locally(values: Tensor, index: Tensor) -> Tensor | None:
    """Select tokens, as ``rae_xla.ops.gather.gather_tokens``, on the device of their row.

    Returns None unless several devices have equally many rows.
    """
    if xs.get_global_mesh() is None:
        return None
    mesh = SpmdMesh.current()
    if mesh.shard_count(mesh.batch_axes) == 1 or not mesh.splits_rows_evenly(values):
        return None
    result: Tensor = _LocalGather.apply(values, index, mesh)
    return result


def register_token_gather() -> None:
    """Register ``gather_tokens_locally`` for this process; once, since it takes the global mesh."""
    if gather_tokens_locally not in dispatch.implementations("gather_tokens", "xla"):
        dispatch.register("gather_tokens", "xla", gather_tokens_locally)


class _LocalGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, mesh: SpmdMesh) -> Tensor:
        ctx.mesh, ctx.tokens = mesh, values.shape[1]
        ctx.save_for_backward(index)
        local = gather_rows(mesh.local_rows(values), mesh.local_rows(index))
        return mesh.global_tensor(local, (mesh.batch_axes,))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        mesh: SpmdMesh = ctx.mesh
        (index,) = ctx.saved_tensors
        local, rows = mesh.local_rows(gradient), mesh.local_rows(index)
        zeros = local.new_zeros(local.shape[0], ctx.tokens, *local.shape[2:])
        sums = zeros.scatter_add(1, expand_index(rows, local), local)
        return mesh.global_tensor(sums, (mesh.batch_axes,)), None, None
