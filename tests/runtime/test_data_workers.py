"""The number of data workers of a process."""

import os
from types import SimpleNamespace

import pytest

from rae_xla.runtime import data_workers
from rae_xla.runtime.data_workers import worker_count

GPU = SimpleNamespace(name="torch", on_cpu=False)


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(64, 1, 8), (64, 8, 7), (16, 8, 1), (8, 1, 7), (8, 8, 0), (4, 8, 0), (1, 1, 0)],
)
def test_processes_with_a_gpu_share_the_cores(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count(GPU, None) == expected <= data_workers.MAX_DEFAULT_WORKERS
    assert worker_count(GPU, 3) == 3
    assert worker_count(GPU, 0) == 0


@pytest.mark.parametrize(("name", "on_cpu"), [("torch", True), ("xla", False), ("xla", True)])
def test_other_devices_have_none_by_default(name, on_cpu):
    assert worker_count(SimpleNamespace(name=name, on_cpu=on_cpu), None) == 0
