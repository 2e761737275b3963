"""The train step: optimizer, moving average and gradient accumulation equal the reference's."""

import copy

import pytest
import torch
from golden_case import load_case
from torch import nn

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start
from rae_xla.train.ema import update_ema
from rae_xla.train.optimizers import AdamW
from rae_xla.train.schedules import Schedule
from rae_xla.train.train_step import make_train_step, split_micro_batches
from rae_xla.transport import create_transport


@pytest.fixture
def backend():
    settings = RuntimeConfig(backend="torch")
    return start(settings, MeshConfig())


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_ema_averages_parameters_and_leaves_buffers():
    case = load_case("train/ema")
    model, ema = small_net(), small_net()
    ema.load_state_dict(case.under("in.ema0"))
    for step in range(5):
        model.load_state_dict(case.under(f"in.model_step{step}"), strict=False)
        update_ema(ema, model, case.meta["decay"])
        for name, tensor in case.under(f"out.ema_step{step}").items():
            torch.testing.assert_close(ema.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def recorded_run(backend, accumulate=1):
    """Run four stage-2 steps with the recorded times and noise; yields (metrics, state)."""
    case = load_case("train/stage2_four_steps")
    meta, transport = case.meta, create_transport(**case.meta["transport"])
    model = DiTDH(**meta["config"])
    model.load_state_dict(case.under("state0"))
    model.requires_grad_(True)  # the reference trains its position table too
    state = make_state(model.train(), backend)
    settings = meta["training_cfg"]["optimizer"]
    optimizer = AdamW(settings["betas"], eps=1e-8, weight_decay=settings["weight_decay"])

    def losses(batch, draws):
        given = {"t": batch["t"], "noise": batch["noise"]}
        return transport.training_losses(model, batch["z"], {"y": batch["y"]}, **given)["loss"]

    step = make_train_step(
        losses,
        state,
        optimizer,
        seed=0,
        ema_decay=meta["ema_decay"],
        clip_grad=meta["clip_grad"],
        accumulate=accumulate,
        backend=backend,
    )
    schedule = Schedule("linear", 1e-3, 1e-4, warmup=2, decay_end=6, warmup_from_zero=True)
    for k in range(4):
        batch = {name: case[f"in.{name}{k}"] for name in ("z", "y", "noise")}
        batch |= {
            "t": transport.sample_times(case[f"in.u{k}"]),
            "row": torch.arange(len(batch["y"]), dtype=torch.int32),
            "step": torch.tensor(k, dtype=torch.int32),
            "lr": torch.tensor(schedule(k)),
        }
        yield step(batch), state


def test_four_recorded_steps(backend):
    case = load_case("train/stage2_four_steps")
    run = list(recorded_run(backend))
    for recorded, (metrics, _) in zip(case.meta["rows"], run, strict=True):
        loss, norm, skipped = metrics.tolist()[:3]
        assert skipped == 0
        assert loss == pytest.approx(recorded["loss"], rel=1e-5)
        assert norm == pytest.approx(recorded["grad_norm_before_clip"], rel=1e-4)
    state = run[-1][1]
    for module, name in ((state.model.module, "state_final"), (state.ema, "ema_final")):
        for key, expected in case.under(f"out.{name}").items():
            torch.testing.assert_close(
                module.state_dict()[key].detach(), expected, rtol=1e-4, atol=2e-5, msg=key
            )


def test_gradient_accumulation_changes_nothing(backend):
    whole = [(m.tolist(), copy.deepcopy(s.ema.state_dict())) for m, s in recorded_run(backend)]
    parts = [(m.tolist(), copy.deepcopy(s.ema.state_dict())) for m, s in recorded_run(backend, 2)]
    for (metrics, weights), (metrics_in_parts, weights_in_parts) in zip(whole, parts, strict=True):
        assert metrics_in_parts == pytest.approx(metrics, rel=1e-5)
        torch.testing.assert_close(weights_in_parts, weights, rtol=1e-4, atol=1e-6)


def test_micro_batches_take_rows_in_turn():
    batch = {"row": torch.arange(6), "step": torch.tensor(3)}
    parts = split_micro_batches(batch, 3)
    assert [part["row"].tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]]
    assert all(part["step"] == 3 for part in parts)
