"""Files of RAEv2: translation of their keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rae_xla.config import load_config
from rae_xla.errors import UserError

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/published/raev2_stage2.yaml"


@pytest.fixture
def write(tmp_path):
    """Write the file with changes: dotted key -> value, None removes a key."""

    def write(**changes):
        tree = yaml.safe_load(FILE.read_text())
        for key, value in changes.items():
            *path, leaf = key.split("__")
            section = tree
            for part in path:
                section = section.setdefault(part, {})
            section[leaf] = value
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def test_published_file_equals_our_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    theirs = load_config(FILE)
    ours = load_config(ROOT / "configs/stage2/ditdh_xl_ig_256_dinov3l_k7.yaml")
    assert theirs.stage_1.params == ours.stage_1.params
    assert theirs.stage_2.params.pop("patch_size") == [1, 1]
    assert ours.stage_2.params.pop("patch_size") == 1
    assert theirs.stage_2.params == ours.stage_2.params
    for section in ("transport", "sampler", "guidance", "internal_guidance", "misc"):
        assert getattr(theirs, section) == getattr(ours, section), section
    for name in ("epochs", "global_batch_size", "ema_decay", "clip_grad", "optimizer", "scheduler"):
        assert getattr(theirs.training, name) == getattr(ours.training, name), name


def test_sections_are_translated(caplog):
    config = load_config(FILE)
    params = config.stage_1.params
    assert params["encoder_cls"] == "DINOv3Encoder"
    assert params["encoder_params"]["layers"] == [11, 13, 15, 17, 19, 21, 23]
    assert params["decoder_output"] == "pixels"
    assert params["image_mean"] == [0.485, 0.456, 0.406]
    model = config.stage_2.params
    assert (model["conditioning"], model["base_model_depth"]) == ("tokens", 8)
    assert model["repa_layer_depth"] is None
    assert config.transport.params.truncate_times is False
    assert config.sampler.params.end == 0
    assert (config.guidance.method, config.guidance.scale) == ("internal", 1.78)
    assert config.training.optimizer.type == "muon"
    assert config.training.optimizer.preset == "polar_express"
    assert config.time_dist_shift == 8
    assert config.data.image_size == 256
    assert config.eval.metrics == ("fid", "is")
    assert "dataset" in caplog.text


def test_an_override_may_name_a_local_encoder():
    config = load_config(FILE, ["stage_1.params.encoder_config_path=some/folder"])
    assert config.stage_1.params["encoder_config_path"] == "some/folder"


@pytest.mark.parametrize(
    ("cfg", "internal", "expected"),
    [
        ({"scale": 2.0}, {"scale": 0.0}, ("cfg", 2.0, 1.0)),
        ({}, {}, ("cfg", 1.0, 1.0)),
        ({"scale": 1.5}, {"scale": 1.3}, ("internal", 1.3, 1.5)),
        ({"scale": 1.5}, {"scale": 1.0, "unconditional_scale": 1.4}, ("internal", 1.0, 1.5)),
    ],
)
def test_guidance(write, cfg, internal, expected):
    guidance = load_config(write(guidance={"cfg": cfg, "ig": internal})).guidance
    assert (guidance.method, guidance.scale, guidance.cfg.scale) == expected


def test_repa(write):
    file = write(repa={"use_repa": True, "repa_layer_depth": 4, "repa_coeff": 0.25})
    config = load_config(file)
    assert config.stage_2.params["repa_layer_depth"] == 4
    assert config.stage_2.params["z_dim"] == 768
    assert config.repa.coeff == 0.25
    assert config.repa.encoder_config_path == "facebook/dinov2-with-registers-base"
    assert config.repa.encoder_input_size == 224


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning__type": "text"}, "only class-conditional ones are supported"),
        ({"stage_2__params__use_cfg_conds": True}, "use_cfg_conds .* is not supported"),
        ({"stage_1__params__encoder_name": "eupe-vit-b"}, "encoder family eupe"),
        ({"stage_1__params__encoder_name": "dinov3"}, "is not an encoder name of RAEv2"),
    ],
)
def test_unsupported_files_are_refused(write, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(write(**changes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["repa.coeff=1"], "repa section is given, so this must be the block"),
        (
            ["stage_2.params.repa_layer_depth=8", "stage_2.params.z_dim=768"],
            "names the encoder to align with, is missing",
        ),
        (["gan.disc.optimizer.type=muon"], "AdamW is the only optimizer of the discriminator"),
        (["training.optimizer.type=sgd"], "expected one of adamw, muon, got 'sgd'"),
    ],
)
def test_contradictions(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(ROOT / "configs/stage2/ditdh_xl_256.yaml", overrides)
