"""Accelerators by the names that drivers and metadata give them."""

import pytest
import torch

from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.runtime import accelerators, start
from rae_xla.runtime.accelerators import (
    known_accelerator,
    torch_device,
    torch_device_name,
    unused_accelerator,
)
from rae_xla.tools.plan.tpus import TPU_GENERATIONS


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("v4-8", 275), ("v5litepod", 197), ("v5e-16", 197), ("v5p-128", 459), ("v6e", 918),
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 NVL", 835), ("NVIDIA H200 NVL", 835), ("NVIDIA H20", 148),
        ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA A40", 149.7), ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121),
        ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71), ("AMD Instinct MI300X", 1307.4),
    ],
)  # fmt: skip
def test_known_names_have_a_peak(name, peak):
    assert known_accelerator(name).peak_flops == pytest.approx(peak * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "", "v2-8", "v50", "NVIDIA GeForce GTX 1080", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "Tesla V100-SXM2-16GB",
        "NVIDIA H800 PCIe", "NVIDIA RTX A600",
    ],
)  # fmt: skip
def test_an_unknown_accelerator_has_no_peak(name):
    assert known_accelerator(name) is None


@pytest.mark.parametrize("generation", TPU_GENERATIONS.values(), ids=TPU_GENERATIONS)
def test_runs_and_plans_agree_on_tpus(generation):
    known = known_accelerator(generation.gcloud)
    assert known.peak_flops == generation.peak_flops
    assert known.hbm_bytes == pytest.approx(generation.hbm_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("found", "expected"), [(None, "cpu"), ("mps", "cpu"), ("xpu", "xpu:3"), ("cuda", "cuda:3")]
)
def test_torch_uses_the_accelerator_where_it_is_supported(monkeypatch, found, expected):
    device = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    assert torch_device(3) == torch.device(expected)


def test_the_cpu_has_a_name():
    assert torch_device_name(torch.device("cpu")) == "CPU"


def test_gpus_that_pytorch_cannot_use_are_reported(monkeypatch, tmp_path, caplog):
    """This PyTorch is the CPU build or finds no driver, whichever; the GPUs are a folder."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if torch.cuda.is_available():
        pytest.skip("the GPUs of this machine work")
    assert unused_accelerator() is None
    monkeypatch.setattr(accelerators, "_NVIDIA_GPUS", tmp_path)
    reason = unused_accelerator()
    assert reason
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())
    assert backend.on_cpu
    assert reason in caplog.text
    assert "CUDA_VISIBLE_DEVICES=" in caplog.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_accelerator() is None
