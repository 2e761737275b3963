"""Chips by the names that drivers and metadata give them."""

import pytest

from rae_xla.plan.chips import CHIPS
from rae_xla.runtime.chips import known_chip


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("v4-8", 275), ("v5litepod", 197), ("v5e-16", 197), ("v5p-128", 459), ("v6e", 918),
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ],
)  # fmt: skip
def test_peaks(name, peak):
    assert known_chip(name).peak_flops == peak * 1e12


@pytest.mark.parametrize("name", ["", "v2-8", "NVIDIA GeForce GTX 1080", "NVIDIA H100 NVL", "v50"])
def test_a_chip_that_is_not_known_has_no_peak(name):
    assert known_chip(name) is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_runs_and_plans_mean_the_same_tpus(chip):
    known = known_chip(chip.gcloud)
    assert known.peak_flops == chip.peak_flops
    assert known.hbm_bytes == pytest.approx(chip.hbm_bytes, rel=0.1)
