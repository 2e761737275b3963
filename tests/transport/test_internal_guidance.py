"""Internal guidance: numbers of RAEv2, trajectories, intervals, number of evaluations, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from raev2_cases import build
from torch import Tensor
from torch.testing import assert_close

from rae_xla.errors import UserError
from rae_xla.models.intermediate_heads import DenoiserOutputs
from rae_xla.transport import create_transport, guided
from rae_xla.transport.internal_guidance import Strength


def strength(options: dict[str, float] | None) -> Strength:
    options = options or {}
    return Strength(
        options.get("scale", 1.0), (options.get("t_min", 0.0), options.get("t_max", 1.0))
    )


def recorded_guidance(run: dict[str, Any], model: Any, y: Tensor) -> Any:
    """Translate the recorded ``cfg`` and ``ig`` sections to ``guided``."""
    cfg, internal = (strength(run.get(key)) for key in ("cfg", "ig"))
    if not run["use_ig"]:
        return guided(model, y, scale=cfg.scale, interval=cfg.interval)
    return guided(
        model,
        y,
        method="internal",
        scale=internal.scale,
        interval=internal.interval,
        cfg=cfg,
        null_scale=run["ig"].get("unconditional_scale"),
    )


@pytest.mark.parametrize("index", range(7))
@torch.no_grad()
def test_guided_outputs_match_golden_values(index: int) -> None:
    model, case = build("guidance/steps")
    x, t, y = case["in.x"], case["in.t"], case["in.y"]
    model_fn = recorded_guidance(case.meta["guidance"][index], model, y)
    expected = case[f"out.guided{index}"]
    # Values of up to 60 are differences of values that agree to 2e-5.
    assert_close(model_fn(x, t), expected, atol=1e-4, rtol=1e-4)
    for row, time in enumerate(t):
        by_time = model_fn.at(float(time))(x, time.expand(len(x)))
        assert_close(by_time[row], expected[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", range(6))
def test_trajectories_match_golden_values(index: int) -> None:
    model, case = build("sampling/trajectories")
    run = case.meta["runs"][index]
    tr = create_transport(prediction=run["prediction"], time_dist_shift=run["shift"])
    grid = tr.time_grid(run["num_steps"], end=0.0)
    assert_close(grid[:-1], case[f"out.t{index}"], rtol=1e-6, atol=1e-7)
    assert grid[-1] == 0
    states: list[Tensor] = []
    model_fn = recorded_guidance(run, model, case["in.y"])

    class Recorder:
        def at(self, time: float) -> Any:
            branch = model_fn.at(time)

            def evaluate(x: Tensor, t: Tensor) -> Tensor:
                states.append(x)
                return branch(x, t)

            return evaluate

    final = tr.sample_ode(Recorder(), case["in.z"], num_steps=run["num_steps"], end=0.0)
    assert len(states) == run["num_steps"]
    assert_close(torch.stack(states), case[f"out.traj{index}"], atol=1e-3, rtol=1e-3)
    assert_close(final, case[f"out.final{index}"], atol=1e-3, rtol=1e-3)


class TwoHeads:
    """A toy model with a base head that counts its rows."""

    num_classes = 7

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, all_outputs: bool = False) -> Any:
        self.rows.append(len(x))
        full = x * (1 + y.float()).reshape(-1, 1) + t.reshape(-1, 1)
        base = 0.5 * x
        return DenoiserOutputs(full, base) if all_outputs else full


def test_internal_guidance_evaluates_the_batch_once() -> None:
    model, x, y = TwoHeads(), torch.randn(3, 2), torch.tensor([0, 1, 2])
    guided(model, y, method="internal", scale=1.5).at(0.5)(x, torch.full((3,), 0.5))
    assert model.rows == [3]
    model_fn = guided(model, y, method="internal", scale=1.5, cfg=Strength(2.0))
    model_fn.at(0.5)(x, torch.full((3,), 0.5))
    assert model.rows == [3, 6]


def test_base_head_is_not_computed_outside_of_the_interval() -> None:
    model, y = TwoHeads(), torch.tensor([0, 1])
    model_fn = guided(model, y, method="internal", scale=1.5, interval=(0.1, 0.7))
    x = torch.randn(2, 2)
    for time, inside in ((0.1, True), (0.7, True), (0.05, False), (0.8, False)):
        t = torch.full((2,), time)
        plain = model(x, t, y)
        assert torch.equal(model_fn.at(time)(x, t), plain) == (not inside)
    assert model_fn.at(0.2) is model_fn.at(0.3)  # one compiled step per branch


def test_mixed_times_equal_separate_rows() -> None:
    x, y, t = torch.randn(3, 2), torch.tensor([0, 1, 2]), torch.tensor([0.2, 0.5, 0.9])

    def make(labels: Tensor) -> Any:
        cfg = Strength(2.0, (0.4, 1.0))
        return guided(
            TwoHeads(), labels, method="internal", scale=1.5, interval=(0.0, 0.6), cfg=cfg
        )

    together = make(y)(x, t)
    for i in range(3):
        alone = make(y[i : i + 1]).at(float(t[i]))(x[i : i + 1], t[i : i + 1])
        assert_close(together[i : i + 1], alone)


def test_extrapolation_is_in_float32() -> None:
    class Half(TwoHeads):
        def __call__(self, *inputs: Tensor, all_outputs: bool = False) -> Any:
            return DenoiserOutputs(*(v.bfloat16() for v in super().__call__(*inputs, True)[:2]))

    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    out = guided(Half(), y, method="internal", scale=1.78).at(0.5)(x, torch.full((3,), 0.5))
    assert out.dtype == torch.float32
    full, base = Half()(x, torch.full((3,), 0.5), y, all_outputs=True)[:2]
    assert torch.equal(out, base.float() + 1.78 * (full.float() - base.float()))


def test_model_without_base_head_raises() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor, all_outputs: bool = False) -> Any:
        return DenoiserOutputs(x)

    model_fn = guided(model, torch.tensor([0]), method="internal", scale=1.5, null_label=1)
    with pytest.raises(UserError, match="requires a model with a base head"):
        model_fn.at(0.5)(torch.randn(1, 2), torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cfg", "null_scale": 1.0}, "options of method 'internal'"),
        ({"method": "internal", "cfg": Strength(2.0, (0.5, 0.5))}, "t_min must be below t_max"),
        ({"method": "internal", "scale": float("nan")}, "must be a finite number"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        guided(TwoHeads(), torch.tensor([0]), **options)
