"""What plain torch tells of itself: speeds, results fetched later, profiles."""

import json

import pytest
import torch

from rae_xla.config import MeshConfig
from rae_xla.runtime.measure import all_reduce_speed, matmul_speed
from rae_xla.runtime.torch import TorchRuntime


@pytest.fixture(scope="module")
def runtime():
    return TorchRuntime(mesh=MeshConfig(), precision="fp32", compile_graphs=False, seed=0)


def test_speeds(runtime):
    assert matmul_speed(runtime, 64) > 0
    assert all_reduce_speed(runtime, 64) is None, "there is one device"


def test_results_fetched_later(runtime):
    values = runtime.put({"x": torch.arange(4.0)})["x"]
    later = runtime.fetch_later(values.sum())
    assert later().item() == 6.0
    assert later().device.type == "cpu"


def test_a_profile_is_a_trace_that_can_be_read(runtime, tmp_path):
    with runtime.profile(tmp_path / "profile"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    [file] = (tmp_path / "profile").iterdir()
    assert file.name.startswith("process-0.")
    assert file.name.endswith(".pt.trace.json")
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::matmul" in names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_and_results_that_wait_for_no_other(runtime):
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    later = runtime.fetch_later(x[0, 0])
    for _ in range(200):
        x = x @ x
    after = torch.cuda.Event()
    after.record()
    later()
    assert not after.query(), "the products are still being computed"
    memory = runtime.memory()
    assert 0 < 4 * 4096**2 <= memory.used <= memory.peak < memory.total
    assert runtime.chip() is None or runtime.chip().peak_flops > 1e13
