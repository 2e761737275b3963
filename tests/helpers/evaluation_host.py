"""A stand-in for a backend that runs several processes as threads, for evaluation tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from rae_xla.runtime.mesh import MeshShape


class Host:
    """The backend of one process; every tensor stays on the CPU.

    Args:
        index: index of the process.
        count: number of processes.
        devices: number of devices of all processes.
        exchange: what the processes exchange values through; None for a single process.
        owners: index of the process of each device, in the order of the mesh; by default the
            devices of a process are consecutive.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        devices: int = 1,
        exchange: Any = None,
        owners: Sequence[int] | None = None,
    ):
        self.process_index, self.process_count = index, count
        self._owners = owners or [i * count // devices for i in range(devices)]
        self.mesh = MeshShape(data=devices, fsdp=1)
        self.device = torch.device("cpu")
        self._exchange = exchange if exchange is not None else _Exchange(count)

    def place(self, module):
        return module

    def compile(self, fn):
        return fn

    def shard_batch(self, batch):
        return batch

    def to_host(self, tensors):
        """Return global tensors: each device has the rows that its place in the mesh gives it."""
        parts = self._exchange.all_gather(self.process_index, dict(tensors))
        devices = len(self._owners) // self.process_count
        found = {}
        for name in tensors:
            shards = [list(part[name].chunk(devices)) for part in parts]
            found[name] = torch.cat([shards[owner].pop(0) for owner in self._owners])
        return found

    def to_host_later(self, tensors):
        return lambda: self.to_host(tensors)

    def autocast(self):
        return nullcontext()

    def full_float32(self):
        return nullcontext()

    def all_gather_text(self, text):
        return self._exchange.all_gather(self.process_index, text)


class _Exchange:
    """An all-gather among threads."""

    def __init__(self, count: int) -> None:
        self._values: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=60)

    def all_gather(self, index: int, value: Any) -> list[Any]:
        self._values[index] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


def on_hosts(
    count: int,
    devices: int,
    work: Callable[[Host], Any],
    owners: Sequence[int] | None = None,
) -> list[Any]:
    """Return the results of ``work`` in each of ``count`` processes."""
    exchange = _Exchange(count)
    hosts = [Host(i, count, devices, exchange, owners) for i in range(count)]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, hosts))
