"""Configurations without weight files, with and without the encoder's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from golden_case import GOLDEN

from rae_xla import instantiate, load_config
from rae_xla.config.geometry import encoder_geometry
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.tools.plan.language_models import published_language_model
from rae_xla.tools.plan.networks import published_encoder, without_weights
from rae_xla.train.text_to_image_model import build_model

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs/stage1").glob("*_256*.yaml"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("facebook/dinov2-with-registers-small", 22.1e6),
        ("facebook/dinov2-with-registers-base", 86.6e6),
        ("facebook/dinov2-with-registers-large", 304.4e6),
        ("google/siglip2-base-patch16-256", 93e6),
        ("facebook/vit-mae-base", 85.8e6),
    ],
)
def test_sizes_of_published_encoders(name, parameters, tmp_path):
    """The parameters of the model card, and the geometry that configurations are checked with."""
    known = published_encoder(name)
    geometry = encoder_geometry(name)
    assert (known["patch_size"], known["hidden_size"]) == (geometry.patch_size, geometry.channels)

    file = next(f for f in CONFIGS if f.name.startswith(name.split("/")[1].split("-")[0][:3]) or
                ("mae" in name and f.name.startswith("mae")))  # fmt: skip
    config = load_config(file, overrides=["data.train=null"])
    params = dict(config.stage_1.params)
    path = next(k for k in params["encoder_params"] if k in ("dinov2_path", "model_name"))
    params |= {"encoder_config_path": name, "encoder_params": {path: name}}
    config = replace(config, stage_1=replace(config.stage_1, params=params))
    planned, notes = without_weights(config, tmp_path)
    assert len(notes) == 1
    with torch.device("meta"):
        rae = cast("RAE", instantiate(planned.stage_1))
    found = sum(p.numel() for p in rae.encoder.parameters())
    assert found == pytest.approx(parameters, rel=0.012)


def test_a_local_encoder_folder_is_used(tmp_path):
    encoder = str(GOLDEN / "rae/dinov2/encoder")
    file = ROOT / "configs/stage1/dinov2_b_256.yaml"
    config = load_config(file, overrides=["data.train=null"])
    params = config.stage_1.params | {
        "encoder_config_path": encoder,
        "encoder_params": {"dinov2_path": encoder},
    }
    config = replace(config, stage_1=replace(config.stage_1, params=params))
    planned, notes = without_weights(config, tmp_path)
    assert notes == []
    assert planned.stage_1.params["encoder_params"]["dinov2_path"] == encoder


def test_an_unknown_encoder_is_rejected(tmp_path):
    file = ROOT / "configs/stage1/dinov2_b_256.yaml"
    config = load_config(file, overrides=["data.train=null"])
    params = config.stage_1.params | {"encoder_params": {"dinov2_path": "some/vit"}}
    config = replace(config, stage_1=replace(config.stage_1, params=params))
    with pytest.raises(UserError, match=r"some/vit has no local config\.json"):
        without_weights(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("models/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
    ],
)
def test_sizes_of_published_language_models(name, parameters):
    """The parameters of the published weights."""
    values = published_language_model(name)
    with torch.device("meta"):
        model = LanguageModel(read_lm_config(values))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_text_to_image_run_is_built_without_weights(tmp_path):
    file = ROOT / "configs/t2i/qwen2.5_1.5b_dit2.4b_siglip2.yaml"
    config, notes = without_weights(load_config(file, overrides=["data.train=null"]), tmp_path)
    with torch.device("meta"):
        model = build_model(config, channels=1152, tokens=256)
    # The published checkpoint has the 151,667 rows of its tokenizer; our tables keep their spare
    # rows.
    spare = 1536 * (151936 - 151667)
    assert sum(p.numel() for p in model.parameters()) == 3_986_918_848 + spare
    assert any("Qwen2.5-1.5B-Instruct has its published sizes" in note for note in notes)
    unknown = load_config(
        file, overrides=["text_to_image.language_model=my/Model", "data.train=null"]
    )
    with pytest.raises(UserError, match=r"my/Model has no local config\.json and is not a known"):
        without_weights(unknown, tmp_path)
    started = load_config(
        file,
        overrides=["text_to_image.language_model=null", "text_to_image.ckpt=x", "data.train=null"],
    )
    with pytest.raises(UserError, match=r"set text_to_image.language_model to its language model"):
        without_weights(started, tmp_path)
