"""Cross-entropy over a sharded vocabulary matrix, which is gathered once in each pass.

Left to itself, the SPMD partitioner gathers the matrix for every chunk of positions, in both
passes, and sends its shards around a ring once for every chunk of the gradient. Here the gradients
of all chunks are added before they are sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor

from rae_xla.ops import dispatch
from rae_xla.ops.cross_entropy import row_gradients, row_losses
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh

_STORED = (None, "fsdp")  # the rule of embeddings in configs/sharding/text_to_image.yaml


def cross_entropy_locally(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor] | None:
    """Compute ``rae_xla.ops.cross_entropy.cross_entropy`` on the devices of the rows.

    Returns None unless ``fsdp`` shards the columns of the weight and every device has equally many
    rows.
    """
    if xs.get_global_mesh() is None:
        return None
    mesh = SpmdMesh.current()
    sharded = "fsdp" in mesh.axis_sizes and weight.shape[1] % mesh.shard_count("fsdp") == 0
    if not sharded or not mesh.splits_rows_evenly(hidden):
        return None
    result: tuple[Tensor, Tensor] = _LocalCrossEntropy.apply(hidden, weight, targets, chunk, mesh)
    return result


def register_cross_entropy() -> None:
    """Register ``cross_entropy_locally`` for this process; once, since it takes the global mesh."""
    if cross_entropy_locally not in dispatch.implementations("cross_entropy", "xla"):
        dispatch.register("cross_entropy", "xla", cross_entropy_locally)


class _LocalCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, mesh: SpmdMesh
    ) -> tuple[Tensor, Tensor]:
        used = _gathered(weight, hidden.dtype, mesh)
        found = row_losses(mesh.local_rows(hidden), used, mesh.local_rows(targets), chunk)
        sums, matches, normalizers = (
            mesh.global_tensor(local, (mesh.batch_axes,)) for local in found
        )
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk, ctx.mesh = chunk, mesh
        ctx.mark_non_differentiable(matches)
        return sums, matches

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        mesh: SpmdMesh = ctx.mesh
        used = _gathered(weight, hidden.dtype, mesh)
        rows = (mesh.local_rows(t) for t in (gradient, hidden, targets, normalizers))
        of_rows, local_hidden, local_targets, local_normalizers = rows
        of_hidden, of_weight = row_gradients(
            of_rows, local_hidden, used, local_targets, local_normalizers, ctx.chunk
        )
        share = mesh.reduce_scatter(of_weight.to(hidden.dtype).t())
        of_weight = mesh.global_tensor(share.t(), _STORED).to(weight.dtype)
        as_stored = mesh.annotation(_STORED)
        return (
            mesh.global_tensor(of_hidden, (mesh.batch_axes,)),
            as_stored(of_weight),
            None,
            None,
            None,
        )


def _gathered(weight: Tensor, dtype: torch.dtype, mesh: SpmdMesh) -> Tensor:
    """Return the complete matrix on each device; its shards are cast before they are sent."""
    return mesh.local_shards(mesh.annotation(_STORED)(weight.to(dtype)), ())
