"""Private APIs of torch 2.9.1 that the torch backend needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


def compiled_graphs() -> int:
    """Return how many graphs ``torch.compile`` has compiled; no public API counts them."""
    from torch._dynamo.utils import counters  # imports the compiler

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """Make this process number 0 of ``count``, of which the others do not exist.

    Collective operations return at once, without having moved anything; on fake tensors
    (``FakeTensorMode``) they only have the right shapes.
    """
    import torch.distributed as dist
    from torch.distributed._tools import fake_collectives  # its import defines them
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert fake_collectives.collective_ops

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Collective:
    """A collective operation between processes.

    Attributes:
        kind: name of the operation, such as ``all-gather``.
        ranks: processes that take part.
        bytes_sent: bytes that each process sends if the operation uses a ring.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes_sent: int


_KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
}


def as_collective(func: Any, args: Any) -> Collective | None:
    """Return the collective operation that a dispatched operation is; None if it is none.

    Args:
        func: an ``OpOverload``, as a dispatch mode receives it.
        args: its arguments.
    """
    kind = _KINDS.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
    if kind is None:
        return None
    from torch.distributed import get_process_group_ranks
    from torch.distributed._tools.fake_collectives import CollectiveOp

    ranks = tuple(get_process_group_ranks(CollectiveOp.get_process_group(func, args)))
    size = CollectiveOp.get_comm_tensor_size(func, None, args, {})
    passes = 2 if kind == "all-reduce" else 1
    return Collective(kind, ranks, passes * size * (len(ranks) - 1) // len(ranks))


def allow_compilations(count: int) -> None:
    """Let ``torch.compile`` make ``count`` graphs of one function before it gives up."""
    import torch._dynamo  # imports the compiler

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)
