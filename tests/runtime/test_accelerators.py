"""Accelerators by the names that drivers and metadata give them."""

import pytest
import torch

from rae_xla.runtime.accelerators import known_accelerator, torch_device, torch_device_name
from rae_xla.tools.plan.tpus import TPU_GENERATIONS


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("v4-8", 275), ("v5litepod", 197), ("v5e-16", 197), ("v5p-128", 459), ("v6e", 918),
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ],
)  # fmt: skip
def test_known_names_have_a_peak(name, peak):
    assert known_accelerator(name).peak_flops == peak * 1e12


@pytest.mark.parametrize("name", ["", "v2-8", "NVIDIA GeForce GTX 1080", "NVIDIA H100 NVL", "v50"])
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
