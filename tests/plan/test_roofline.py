"""From bytes and FLOPs to time and money."""

from __future__ import annotations

import pytest

from rae_xla.plan.chips import parse_topology
from rae_xla.plan.roofline import bill, fsdp_minimum, roofline

V6E = parse_topology("v6e:4x4")


def times(**changes):
    given = {"model_flops": 0, "executed_flops": 0, "hbm_bytes": 0, "ici_bytes": 0, "dcn_bytes": 0}
    return roofline(V6E, **given | changes)


def test_the_minimum_of_the_published_model():
    """DiT-DH-XL over 16 chips in bf16: two gathers and a scatter of 838.4 M parameters."""
    assert fsdp_minimum(838.4e6, 16, 2) / 2**20 == pytest.approx(4498, abs=1)
    assert fsdp_minimum(838.4e6, 1, 2) == 0


def test_the_slowest_resource_sets_the_time():
    found = times(model_flops=16 * 918e12, executed_flops=2 * 16 * 918e12, hbm_bytes=1.64e12)
    assert (found.compute, found.memory) == pytest.approx((2, 1))
    assert (found.step, found.limit) == (found.compute, "compute")
    assert found.mfu == pytest.approx(0.5)  # the other half is computed again

    found = times(model_flops=16 * 918e12, executed_flops=16 * 918e12, ici_bytes=4 * 448e9)
    assert (found.step, found.limit, found.mfu) == (4, "interconnect", pytest.approx(0.25))

    found = times(model_flops=1, executed_flops=1, dcn_bytes=3 * V6E.chip.dcn_bandwidth)
    assert (found.step, found.limit) == (3, "network")


def test_the_bill():
    found = bill(V6E, step_seconds=0.36, batch=1024, steps=100_000, price=2.5)
    assert found.images_per_second == pytest.approx(1024 / 0.36)
    assert (found.hours, found.chip_hours, found.price) == pytest.approx((10, 160, 400))
    assert bill(V6E, 1.0, 1, 1, None).price is None
