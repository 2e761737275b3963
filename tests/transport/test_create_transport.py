"""create_transport: intervals and defaults against golden values, invalid options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import load_case

from rae_xla.errors import UserError
from rae_xla.transport import create_transport

ROWS = load_case("transport/intervals").meta["rows"]


def interval(row: dict[str, Any], kind: str) -> tuple[float, float]:
    tr = create_transport(row["path"], row["prediction"], **row["given"])
    match kind:
        case "train":
            return tr.train_interval
        case "ode":
            return tr.ode_interval
        case "sde_sbdm":
            return tr.sde_interval("SBDM", 0.04)
        case "sde_sigma":
            return tr.sde_interval("sigma", 0.04)
        case _:
            return tr.sde_interval("sigma", 0.0)


@pytest.mark.parametrize("kind", ["train", "ode", "sde_sbdm", "sde_sigma", "sde_sigma_nolast"])
def test_time_intervals_match_golden_values(kind: str) -> None:
    for row in ROWS:
        expected = row[kind]
        if isinstance(expected, str) or None in expected:
            with pytest.raises(UserError, match="sample_eps=1e-3"):
                interval(row, kind)
        else:
            assert interval(row, kind) == pytest.approx(tuple(expected), abs=1e-9), row


def test_eps_defaults_match_golden_values() -> None:
    for row in ROWS:
        tr = create_transport(row["path"], row["prediction"], **row["given"])
        assert (tr.train_eps, tr.sample_eps) == (row["train_eps"], row["sample_eps"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_type": "Cosine"}, "path_type: 'Cosine' is not one of Linear, GVP, VP"),
        ({"prediction": "x0"}, "prediction: 'x0' is not one of velocity, noise, score"),
        ({"loss_weight": "snr"}, "loss_weight: 'snr' is not one of velocity, likelihood"),
        ({"time_dist_shift": 0.5}, "time_dist_shift must be at least 1"),
        ({"time_dist_shift": float("nan")}, "time_dist_shift"),
        ({"train_eps": -1e-3}, "train_eps"),
        ({"sample_eps": 0.7}, "sample_eps"),
    ],
)
def test_invalid_option_error_names_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_transport(**options)


@pytest.mark.parametrize(("path", "prediction"), [("Linear", "noise"), ("VP", "velocity")])
def test_sampling_without_required_sample_eps_raises(path: str, prediction: str) -> None:
    tr = create_transport(path, prediction)
    with pytest.raises(UserError, match="sample_eps"):
        tr.sample_ode(lambda x, t: x, torch.zeros(1, 2))
