"""Speeds, delayed copies and profiles of the torch backend."""

import json

import pytest
import torch

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.runtime.measure import all_reduce_speed, matmul_speed
from rae_xla.runtime.torch.backend import TorchBackend


@pytest.fixture(scope="module")
def backend():
    return TorchBackend(RuntimeConfig(), MeshConfig())


def test_speeds(backend):
    assert matmul_speed(backend, 64) > 0
    assert all_reduce_speed(backend, 64) is None, "a single device sends nothing"


def test_results_are_fetched_later(backend):
    values = backend.shard_batch({"x": torch.arange(4.0)})["x"]
    later = backend.fetch_later(values.sum())
    assert later().item() == 6.0
    assert later().device.type == "cpu"


def test_a_profile_is_a_readable_trace(backend, tmp_path):
    with backend.profile(tmp_path / "profile"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    [file] = (tmp_path / "profile").iterdir()
    assert file.name.startswith("process-0.")
    assert file.name.endswith(".pt.trace.json")
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::matmul" in names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reports_memory_and_fetching_waits_for_no_later_work(backend):
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    later = backend.fetch_later(x[0, 0])
    for _ in range(200):
        x = x @ x
    after = torch.cuda.Event()
    after.record()
    later()
    assert not after.query(), "the products should still be running"
    memory = backend.memory()
    assert 0 < 4 * 4096**2 <= memory.used <= memory.peak < memory.total
    assert backend.accelerator() is None or backend.accelerator().peak_flops > 1e13
