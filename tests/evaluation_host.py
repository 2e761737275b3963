"""As much of a runtime as evaluation needs, with as many devices and processes as a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rae_xla.runtime.mesh import MeshShape


class Host:
    """One of several processes, which are threads here; every tensor stays where it is."""

    def __init__(self, index: int = 0, count: int = 1, devices: int = 1, table: Any = None):
        self.process_index, self.process_count = index, count
        self.mesh = MeshShape(data=devices, fsdp=1)
        self.device = torch.device("cpu")
        self._table = table if table is not None else _Table(count)

    def place(self, module):
        return module

    def compile(self, fn):
        return fn

    def put(self, batch):
        return batch

    def to_host(self, tensors):
        parts = self._table.pass_round(self.process_index, dict(tensors))
        return {name: torch.cat([part[name] for part in parts]) for name in tensors}

    def exchange(self, text):
        return self._table.pass_round(self.process_index, text)


class _Table:
    """Where all put something down before any takes."""

    def __init__(self, count: int) -> None:
        self._things: list[Any] = [None] * count
        self._all_here = threading.Barrier(count, timeout=60)

    def pass_round(self, index: int, thing: Any) -> list[Any]:
        self._things[index] = thing
        self._all_here.wait()
        found = list(self._things)
        self._all_here.wait()
        return found


def on_hosts(count: int, devices: int, work: Callable[[Host], Any]) -> list[Any]:
    """What ``work`` gives in each of so many processes."""
    table = _Table(count)
    hosts = [Host(i, count, devices, table) for i in range(count)]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, hosts))
