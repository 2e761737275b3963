"""How fast the devices of a run multiply, and how fast they add up over each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rae_xla.runtime.interface import Runtime

REPEATS = 10


def matmul_speed(runtime: Runtime, size: int) -> float:
    """FLOP/s per device of products of ``size`` x ``size`` matrices, one on each device.

    In bf16, on a CPU in fp32, which is what it is good at.
    """
    dtype = torch.float32 if _on_cpu(runtime) else torch.bfloat16
    # scaled so that products of products stay what they are in size
    host = torch.randn(_own_rows(runtime), size, size).mul_(size**-0.5).to(dtype)
    matrices = runtime.put({"matrices": host})["matrices"]
    product = runtime.compile(torch.bmm)
    return 2 * size**3 / _seconds(runtime, lambda: product(matrices, matrices))


def all_reduce_speed(runtime: Runtime, size: int) -> float | None:
    """Bytes/s that each device sends while ``size`` fp32 numbers of every device are added up.

    Counted as a ring would send them, 2 (n - 1) / n times their bytes. None for one device alone.
    """
    count = _devices(runtime)
    if count == 1:
        return None
    if runtime.backend == "xla":
        # every device has a row; the sum that each of them is to have is an all-reduce
        host = torch.ones(_own_rows(runtime), size)
        rows = runtime.put({"rows": host})["rows"]
        total = runtime.compile(lambda x: x.sum(0))
        seconds = _seconds(runtime, lambda: total(rows))
    else:
        import torch.distributed as dist

        own = torch.ones(size, device=runtime.device)
        seconds = _seconds(runtime, lambda: dist.all_reduce(own, op=dist.ReduceOp.MAX))
    return 2 * (count - 1) / count * 4 * size / seconds


def _devices(runtime: Runtime) -> int:
    """Among which rows are split: those of the ``tensor`` axis hold the same."""
    return runtime.mesh.batch_parts


def _own_rows(runtime: Runtime) -> int:
    return max(1, _devices(runtime) // runtime.process_count)


def _on_cpu(runtime: Runtime) -> bool:
    return runtime.device.type == "cpu" or (runtime.backend == "xla" and runtime.chip() is None)


def _seconds(runtime: Runtime, work: Callable[[], Any]) -> float:
    """Of one call, the first ones left out."""
    results: list[Tensor | None] = [work()]
    runtime.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        results.append(work())  # kept: what nobody holds need not be computed
    runtime.synchronize()
    return (time.perf_counter() - start) / REPEATS
