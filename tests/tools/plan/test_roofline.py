"""Roofline model and cost."""

from __future__ import annotations

import pytest

from rae_xla.tools.plan.roofline import fsdp_minimum, roofline, run_cost
from rae_xla.tools.plan.tpus import parse_topology

V6E = parse_topology("v6e:4x4")


def times(**changes):
    given = {"model_flops": 0, "executed_flops": 0, "hbm_bytes": 0, "ici_bytes": 0, "dcn_bytes": 0}
    return roofline(V6E, **given | changes)


def test_fsdp_minimum_of_dit_dh_xl():
    """Two all-gathers and a reduce-scatter of 838.4 M parameters over 16 chips in bf16."""
    assert fsdp_minimum(838.4e6, 16, 2) / 2**20 == pytest.approx(4498, abs=1)
    assert fsdp_minimum(838.4e6, 1, 2) == 0


def test_the_slowest_resource_determines_the_step_time():
    found = times(model_flops=16 * 918e12, executed_flops=2 * 16 * 918e12, hbm_bytes=1.64e12)
    assert (found.compute, found.memory) == pytest.approx((2, 1))
    assert (found.step, found.limit) == (found.compute, "compute")
    assert found.mfu == pytest.approx(0.5)  # half of the FLOPs are recomputation

    found = times(model_flops=16 * 918e12, executed_flops=16 * 918e12, ici_bytes=4 * 448e9)
    assert (found.step, found.limit, found.mfu) == (4, "interconnect", pytest.approx(0.25))

    found = times(model_flops=1, executed_flops=1, dcn_bytes=3 * V6E.generation.dcn_bandwidth)
    assert (found.step, found.limit) == (3, "network")

    found = times(model_flops=16 * 918e12, executed_flops=16 * 918e12, host=2)
    assert (found.step, found.limit, found.mfu) == (2, "host", pytest.approx(0.5))


def test_cost_of_a_run():
    found = run_cost(V6E, step_seconds=0.36, batch=1024, steps=100_000, price=2.5)
    assert found.images_per_second == pytest.approx(1024 / 0.36)
    assert (found.hours, found.chip_hours, found.price) == pytest.approx((10, 160, 400))
    assert run_cost(V6E, 1.0, 1, 1, None).price is None
