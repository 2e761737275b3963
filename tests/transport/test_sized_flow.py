"""Flow matching of Scale-RAE: golden times, losses and trajectories."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.head import PerTokenDiT
from rae_xla.models.text_to_image.latents import LatentStatistics
from rae_xla.transport import guided
from rae_xla.transport.sized_flow import SizedFlow, size_shift, table_times

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def head_and_flow(case: Case) -> tuple[PerTokenDiT, SizedFlow]:
    config = case.meta["config"]
    model = PerTokenDiT(
        input_size=round(config["diffusion_tokens"] ** 0.5),
        in_channels=config["diffusion_channels"],
        condition_dim=config["z_channels"],
        hidden_size=config["model_hidden_size"],
        depth=config["model_depth"],
        num_heads=config["model_heads"],
        condition_dropout_prob=config["class_dropout_prob"],
    )
    model.load_state_dict(case.under("state"))
    shift = size_shift(config["diffusion_channels"], config["diffusion_tokens"], config["base_dim"])
    return model.eval(), SizedFlow(shift)


def as_map(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def test_times_and_sampling_points_match_golden_values() -> None:
    case = load_case("t2i/transport/time_shift")
    for i, entry in enumerate(case.meta["rows"]):
        shift = size_shift(entry["C"], entry["tokens"], entry["base_dim"])
        assert shift == pytest.approx(entry["alpha"], rel=1e-12)
        flow = SizedFlow(shift)
        torch.testing.assert_close(
            flow.times_from_normal(case["in.u"]),
            case[f"out.t_shifted.{i}"],
            atol=1e-6,
            rtol=1e-6,
            check_dtype=False,
        )
        points = case[f"out.sampler_points.{i}"].sort(descending=True).values
        torch.testing.assert_close(
            flow.time_grid(51)[:-1].double(), points.double(), atol=1e-7, rtol=1e-7
        )
        assert flow.time_grid(51)[-1] == 0


def test_uniform_numbers_give_the_same_distribution() -> None:
    u = (torch.arange(1000) + 0.5) / 1000
    times = SizedFlow(0.7).sample_times(u)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(u)
    torch.testing.assert_close(times, SizedFlow(0.7).times_from_normal(normal), atol=1e-5, rtol=0)
    ends = SizedFlow(8.0).sample_times(torch.tensor([0.0, 1 - 2.0**-24]))
    assert (ends > 0).all()
    assert (ends < 1).all()


def test_losses_match_golden_values() -> None:
    case = load_case("t2i/transport/training_loss")
    model, flow = head_and_flow(case)
    times = flow.times_from_normal(case["in.u"])
    torch.testing.assert_close(times, case["out.t"], **CLOSE)
    for noise, t, expected in (
        ("in.noise", times, "out.loss_per_image"),
        ("in.noise_f32", case["in.t_f32"], "out.loss_per_image_f32"),
    ):
        losses = flow.training_losses(
            model, as_map(case["in.x_tokens"]), {"y": case["in.z"]}, t, case[noise]
        )["loss"]
        torch.testing.assert_close(losses, case[expected], **CLOSE)


def test_statistics_of_latents_enter_the_loss() -> None:
    case = load_case("t2i/transport/training_loss")
    model, flow = head_and_flow(case)
    for kind in ("C", "LC"):
        statistics = LatentStatistics(case[f"stat.{kind}.running_mean"].shape)
        statistics.set(case[f"stat.{kind}.running_mean"], case[f"stat.{kind}.running_var"])
        tokens = statistics.normalize(case["in.x_tokens"])
        losses = flow.training_losses(
            model, as_map(tokens), {"y": case["in.z"]}, case["out.t"], case["in.noise"]
        )["loss"]
        torch.testing.assert_close(losses, case[f"out.stats_{kind}.loss_per_image"], **CLOSE)
        torch.testing.assert_close(statistics.restore(tokens), case["in.x_tokens"])


@pytest.mark.parametrize("steps", [10, 50])
def test_samples_match_golden_values(steps: int) -> None:
    case = load_case("t2i/transport/sampler_target")
    model, flow = head_and_flow(case)
    torch.testing.assert_close(
        flow.time_grid(steps + 1).double(), case[f"out.n{steps}.to_zero.grid"], atol=1e-7, rtol=0
    )
    for scale, name in ((1.0, "tokens"), (3.0, "cfg3_tokens")):
        null = model.null_condition.detach()
        model_fn = guided(model, case["in.z"], scale=scale, null_label=null)
        x = flow.sample_ode(model_fn, case["in.x_end"], num_steps=steps + 1)
        tokens = x.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, case[f"out.n{steps}.to_zero.{name}"], **CLOSE)


def test_table_has_the_published_times() -> None:
    indices = [round(1000 * t) - 1 for t in reversed(table_times(50))]
    assert indices[:5] == [0, 20, 41, 61, 82]
    assert indices[-3:] == [958, 979, 999]
    assert table_times(1) == [1.0]


def test_shift_must_be_positive() -> None:
    with pytest.raises(UserError, match="must be positive"):
        SizedFlow(0.0)
