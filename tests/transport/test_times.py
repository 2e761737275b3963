"""Time shift, time distributions and sampling grid against golden values."""

from __future__ import annotations

import math

import pytest
import torch
from golden_case import Case, load_case
from torch.testing import assert_close

from rae_xla.errors import UserError
from rae_xla.transport import create_transport
from rae_xla.transport.times import parse_time_distribution, shift_time


@pytest.fixture(scope="module")
def recorded() -> Case:
    return load_case("transport/time_distribution")


def test_shift_matches_golden_values(recorded: Case) -> None:
    for row in recorded.meta["shifts"]:
        shifted = shift_time(recorded["in.grid"], row["shift"])
        assert_close(shifted, recorded[f"out.shift_grid.{row['i']}"], rtol=1e-6, atol=1e-7)
        assert shifted[0] == 0
        assert shifted[-1] == 1


def test_shift_preserves_0_and_1_and_the_order() -> None:
    ends = torch.tensor([0.0, 1.0])
    shifts = [math.sqrt(dim / 4096) for dim in range(4096, 2_000_000, 1024)]
    for shift in (*shifts, 0.1, 1.0, 1e3):
        assert shift_time(ends, shift).tolist() == [0.0, 1.0]
    grid = torch.linspace(0, 1, 1001)
    shifted = shift_time(grid, math.sqrt(24))
    assert (shifted.diff() > 0).all()
    assert torch.equal(shift_time(grid, 1.0), grid)


def test_sampled_times_match_golden_values(recorded: Case) -> None:
    for row in recorded.meta["draws"]:
        tr = create_transport(
            prediction=row["prediction"],
            time_dist_type=row["dist"],
            time_dist_shift=row["shift"],
        )
        u = recorded[f"in.u.{row['dist']}.{row['prediction']}"]
        assert_close(tr.sample_times(u), recorded[f"out.t.{row['key']}"], rtol=1e-5, atol=1e-6)


def test_extreme_random_numbers_stay_in_interval() -> None:
    u = torch.tensor([0.0, 1e-30, 1 - 2**-24])
    for name in ("uniform", "logit-normal_0_1", "logit-normal_-3_2.5"):
        t = parse_time_distribution(name).sample(u, (0.0, 0.999))
        assert t.isfinite().all()
        assert t.min() >= 0
        assert t.max() <= 0.999


def test_sampling_grid_matches_golden_values() -> None:
    case = load_case("transport/ode")
    for s, shift in enumerate(case.meta["shifts"]):
        for n in (10, 50):
            grid = create_transport(time_dist_shift=shift).time_grid(n)
            assert_close(grid, case[f"out.time_grid.n{n}.s{s}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "beta",
        "logit-normal",
        "logit-normal_0",
        "logit-normal_0_0",
        "logit-normal_0_-1",
        "logit-normal_a_b",
        None,
    ],
)
def test_unknown_distribution_raises(name: str) -> None:
    with pytest.raises(UserError, match="logit-normal_<mean>_<std>"):
        create_transport(time_dist_type=name)
