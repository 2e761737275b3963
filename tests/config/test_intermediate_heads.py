"""Settings of in-context conditioning, base head, internal guidance and data prediction."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_xla.config import load_config
from rae_xla.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs/stage2/ditdh_xl_256.yaml"
BASE_HEAD = "stage_2.params.base_model_depth=8"


def test_all_options_together():
    config = load_config(
        CONFIG,
        [
            BASE_HEAD,
            "stage_2.params.conditioning=tokens",
            "transport.params.prediction=x",
            "sampler.params.end=0",
            "guidance.method=internal",
            "guidance.scale=1.78",
            "guidance.cfg.scale=1.5",
            "internal_guidance.base_model_coeff=0.5",
        ],
    )
    assert config.stage_2.params["num_c_tokens"] == 8
    assert config.internal_guidance.base_model_coeff == 0.5
    assert load_config(CONFIG).stage_2.params["conditioning"] == "adaln"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["guidance.method=internal"], "internal guidance needs a model with a base head"),
        (["stage_2.params.base_model_depth=29"], r"29, but .* gives 28 blocks of the encoder"),
        (["stage_2.params.base_model_depth=0"], "expected a number of at least 1, got 0"),
        (["stage_2.params.repa_layer_depth=8"], "z_dim .* must be the number of channels"),
        (["stage_2.params.conditioning=token"], "expected one of adaln, tokens, got 'token'"),
        (["transport.params.prediction=data"], "expected one of velocity, noise, score, x"),
        (["transport.params.t_eps=1"], "at least 0 and below 1, got 1"),
        (["sampler.params.end=1"], "at least 0 and below 1, got 1"),
        (
            [BASE_HEAD, "guidance.method=internal", "guidance.cfg.t_min=1"],
            r"guidance\.cfg\.t_min .* t_min < t_max, got 1\.0 and 1\.0",
        ),
        (
            [
                BASE_HEAD,
                "guidance.method=internal",
                "guidance.cfg.scale=2",
                "stage_2.params.class_dropout_prob=0",
            ],
            r"guidance\.cfg\.scale .* needs a null label",
        ),
    ],
)
def test_contradictions(overrides, reason):
    with pytest.raises(UserError, match=reason):
        load_config(CONFIG, overrides)


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("guidance.cfg.scale=1.5", False),
        ("sampler.params.end=0", False),
        ("internal_guidance.base_model_coeff=0.5", True),
        ("transport.params.t_eps=0.1", True),
    ],
)
def test_identity(override, differs):
    assert bool(load_config(CONFIG).diff(load_config(CONFIG, [override]))) == differs
