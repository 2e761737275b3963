"""The recorded training steps of RAEv2, on any backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from golden_case import Case
from raev2_cases import model_settings
from torch import Tensor

from rae_xla.checkpoint.train_state import TrainState, make_state
from rae_xla.config import OptimizerConfig, TrainingConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.pretrained.dit_layouts import from_raev2
from rae_xla.runtime import Backend
from rae_xla.train.muon import first_moment_only, make_optimizer
from rae_xla.train.train_step import make_train_step
from rae_xla.transport import create_transport

PRESET_NAMES = {"POLAR_EXPRESS_COEFFICIENTS": "polar_express", "YOU_COEFFICIENTS": "you"}


def settings(recorded: Mapping[str, Any], **changes: Any) -> OptimizerConfig:
    """Translate a recorded optimizer section."""
    if recorded["type"] == "adamw":
        return OptimizerConfig(lr=recorded["lr"], **changes)
    keys = ("lr", "momentum", "nesterov", "weight_decay", "adamw_lr", "betas")
    values = {key: recorded[key] for key in keys if key in recorded}
    preset = PRESET_NAMES[recorded.get("ns_coefficients_preset", "POLAR_EXPRESS_COEFFICIENTS")]
    return OptimizerConfig(type="muon", preset=preset, **(values | changes))


def recorded_steps(
    case: Case, backend: Backend, tolerance: float, steps: int | None = None
) -> TrainState:
    """Take the training steps of a case, compiled; compare losses and norms; return the state."""
    meta = case.meta
    model = DiTDH(**model_settings(meta["config"]))
    model.load_state_dict(from_raev2(case.under("state")))
    config = TrainingConfig(optimizer=settings(meta["optimizer"]))
    state = make_state(model.train(), backend, first_moment_only=first_moment_only(config, model))
    transport = create_transport(prediction="x", time_dist_shift=meta["shift"])

    def losses(batch: dict[str, Tensor], _: Any) -> Tensor:
        noise, t = batch["noise"], batch["t"]
        outputs = model(
            transport.interpolate(batch["x"], noise, t),
            t,
            batch["y"],
            label_drop=batch["u"] < meta["cfg_dropout_prob"],
            all_outputs=True,
        )
        full, base = (
            transport.output_loss(out, batch["x"], noise, t) for out in (outputs.full, outputs.base)
        )
        return full + meta["base_model_coeff"] * base

    step = backend.compile(
        make_train_step(
            losses,
            state,
            make_optimizer(config),
            seed=0,
            ema_decay=meta["ema_decay"],
            clip_grad=meta["clip_grad"],
            accumulate=1,
            backend=backend,
        )
    )
    shift = meta["shift"]
    for k, recorded in enumerate(meta["steps"][:steps]):
        t = torch.sigmoid(case[f"in.tnormal{k}"])
        batch = {name: case[f"in.{name}{k}"] for name in ("noise", "y", "u")} | {
            "x": case[f"in.x1{k}"],
            "t": shift * t / (1 + (shift - 1) * t),
            "row": torch.arange(4, dtype=torch.int32),
            "step": torch.tensor(k, dtype=torch.int32),
            "lr": torch.tensor(recorded["lr"][0]),
        }
        [values] = backend.fetch([step(backend.shard_batch(batch))])
        loss, norm, _ = values.tolist()
        assert loss == pytest.approx(recorded["loss"], rel=tolerance)
        # Rounding accumulates over the steps; the recorded tolerance of gradients is 1e-3.
        assert norm == pytest.approx(recorded["grad_norm_before_clip"], rel=max(tolerance, 1e-4))
    return state
