"""Work on matrices that are sharded over processes, each of which computes some of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def apply_divided(
    function: Callable[[Tensor], Tensor],
    stack: Tensor,
    dimension: int | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Apply a function to a stack of matrices; see ``Backend.apply_to_matrices``.

    Sharded matrices are exchanged twice, all to all: every process receives the shards of its
    matrices from the others, and returns the shards of the results. That is as many bytes in each
    direction as the process holds, where gathering all matrices would take that many from every
    process. Complete matrices are computed by one process each and gathered.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return function(stack)
    count, share = len(stack), -(-len(stack) // size)
    padding = share * size - count
    if padding:
        stack = torch.cat([stack, stack.new_zeros(padding, *stack.shape[1:])])
    if dimension is None:
        own = function(stack[rank * share : (rank + 1) * share]).contiguous()
        result = own.new_empty(share * size, *own.shape[1:])
        dist.all_gather_into_tensor(result, own, group=group)
        return result[:count]
    sent = stack.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    # (processes, matrices, ...): the shards of this process's matrices, by the process they are of
    shards = received.unflatten(0, (size, share)).unbind(0)
    whole = function(torch.cat(shards, dim=dimension))
    returned = torch.stack(whole.chunk(size, dim=dimension)).flatten(0, 1).contiguous()
    result = torch.empty_like(returned)
    dist.all_to_all_single(result, returned, group=group)
    return result[:count]
