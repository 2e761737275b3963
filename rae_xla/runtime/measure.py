"""Speed tests of the devices of a run: matrix products and all-reduces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rae_xla.runtime.backend import Backend

REPEATS = 10


def matmul_speed(backend: Backend, size: int) -> float:
    """Return the FLOP/s of each device in products of ``size`` x ``size`` matrices.

    Every device multiplies its own matrices, in bf16; on a CPU in fp32, for which CPUs have
    fast instructions.
    """
    dtype = torch.float32 if backend.on_cpu else torch.bfloat16
    # Scaled so that products of products keep their magnitude.
    host = torch.randn(_rows_per_process(backend), size, size).mul_(size**-0.5).to(dtype)
    matrices = backend.shard_batch({"matrices": host})["matrices"]
    product = backend.compile(torch.bmm)
    return 2 * size**3 / _seconds(backend, lambda: product(matrices, matrices))


def all_reduce_speed(backend: Backend, size: int) -> float | None:
    """Return the bytes/s that each device sends in an all-reduce of ``size`` fp32 numbers.

    A ring is assumed: each device sends 2 (n - 1) / n times the bytes of its numbers.

    Returns:
        The speed, or None for a single device.
    """
    count = backend.mesh.batch_shards
    if count == 1:
        return None
    if backend.name == "xla":
        # Every device has one row; the sum over rows, replicated, is an all-reduce.
        host = torch.ones(_rows_per_process(backend), size)
        rows = backend.shard_batch({"rows": host})["rows"]
        total = backend.compile(lambda x: x.sum(0))
        seconds = _seconds(backend, lambda: total(rows))
    else:
        own = torch.ones(size, device=backend.device)
        seconds = _seconds(backend, lambda: dist.all_reduce(own, op=dist.ReduceOp.MAX))
    return 2 * (count - 1) / count * 4 * size / seconds


def _rows_per_process(backend: Backend) -> int:
    """One row for each shard of the batch; the devices of the ``tensor`` axis have the same."""
    return max(1, backend.mesh.batch_shards // backend.process_count)


def _seconds(backend: Backend, work: Callable[[], Any]) -> float:
    """Return the time of one call, after two warm-up calls, which compile and capture it."""
    results: list[Tensor | None] = [work(), work()]
    backend.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        results.append(work())  # kept, because XLA does not compute results that are dropped
    backend.synchronize()
    return (time.perf_counter() - start) / REPEATS
