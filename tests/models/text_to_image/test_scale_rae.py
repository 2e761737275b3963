"""Published checkpoints of Scale-RAE: key maps, sizes, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_case import load_case
from safetensors.torch import load_file, save_file
from text_to_image_cases import load_joint

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.scale_rae import (
    from_published,
    infer_settings,
    load_scale_rae,
    save_scale_rae,
    time_shift,
    to_published,
    untied,
)
from rae_xla.models.text_to_image.settings import HeadSettings

KEYMAPS = [
    "ScaleRAE_Qwen2.5-1.5B_DiT2.4B_SigLIP2",
    "ScaleRAE_Qwen2.5-1.5B_DiT2.4B_WebSSL",
    "ScaleRAE_Qwen2.5-7B_DiT9.8B_docs_sizes",
]


@pytest.mark.parametrize("name", KEYMAPS)
def test_key_map_matches_published_file(name: str) -> None:
    meta = load_case(f"t2i/keymaps/{name}").meta
    config = meta["config"]
    with torch.device("meta"):
        published = {k: torch.empty(shape) for k, (shape, _) in meta["keys"].items()}
        model = TextToImageModel(
            LanguageModel(read_lm_config({"model_type": "qwen2", **config["llm"]})),
            infer_settings(published, config, name),
        )
    assert model.settings == HeadSettings(
        tokens=config["tokens"],
        channels=config["latent_channels"],
        condition_dim=config["diffusion_model_z_channels"],
        hidden_size=config["diffusion_model_hidden_size"],
        depth=config["diffusion_model_depth"],
        num_heads=config["diffusion_model_heads"],
        condition_dropout_prob=config["diffusion_class_dropout_prob"],
    )
    tied = config["llm"]["tie_word_embeddings"]
    expected = {k: tuple(t.shape) for k, t in untied(published, tied).items()}
    assert {k: tuple(t.shape) for k, t in to_published(model.state_dict()).items()} == expected
    assert set(from_published(untied(published, tied))) == set(model.state_dict())
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == meta["n_params"]
    frozen = [k for k, p in to_published(parameters).items() if not p.requires_grad]
    assert frozen == meta["frozen_by_default"]


@pytest.mark.parametrize("name", ["query_a", "query_multi_image_k3_aux"])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_saved_folder_loads_to_the_same_model(name: str, shard_size: str, tmp_path: Path) -> None:
    joint = load_joint(name)
    save_scale_rae(joint.model, tmp_path / "saved", shard_size=shard_size)
    assert (tmp_path / "saved/model.safetensors.index.json").exists() == (shard_size == "100KB")
    loaded = load_scale_rae(str(tmp_path / "saved"))
    assert loaded.settings == joint.model.settings
    for key, tensor in joint.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    ids, slots = joint.case["in.input_ids"], joint.slots
    hidden = loaded.language_model(loaded.embed(ids, joint.features, slots))
    torch.testing.assert_close(hidden, joint.case["out.hidden_states"], atol=2e-5, rtol=1e-4)
    trained = [n for n, p in loaded.named_parameters() if not p.requires_grad]
    assert trained == ["head.pos_embed"]


def test_folder_with_a_copy_of_tied_embeddings_loads(tmp_path: Path) -> None:
    joint = load_joint("query_a")
    save_scale_rae(joint.model, tmp_path / "saved")
    file = tmp_path / "saved/model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    load_scale_rae(str(tmp_path / "saved"))
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_scale_rae(str(tmp_path / "saved"))


def test_files_of_different_models_are_refused(tmp_path: Path) -> None:
    joint = load_joint("query_a")
    save_scale_rae(joint.model, tmp_path / "saved")
    config = tmp_path / "saved/config.json"
    values = json.loads(config.read_text())
    for changes, message in (
        ({"vocab_size": 300}, "297 token embeddings, config.json says 300"),
        ({"num_hidden_layers": 3}, "`layer_types`"),
        ({"num_hidden_layers": 3, "layer_types": None}, "missing language_model.base.layers.2"),
    ):
        config.write_text(json.dumps(values | changes))
        with pytest.raises(UserError, match=message):
            load_scale_rae(str(tmp_path / "saved"))
    config.write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match=r"config\.json has no vocab_size"):
        load_scale_rae(str(tmp_path / "saved"))
    config.write_text(json.dumps(values))
    state = load_file(tmp_path / "saved/model.safetensors")
    state.pop("model.latent_queries")
    save_file(state, tmp_path / "saved/model.safetensors")
    with pytest.raises(UserError, match=r"not a checkpoint of Scale-RAE.*latent_queries"):
        load_scale_rae(str(tmp_path / "saved"))


def test_time_shift_follows_the_configuration() -> None:
    settings = HeadSettings(tokens=256, channels=1152)
    assert time_shift({}, settings) == pytest.approx(8.48528137423857)
    assert time_shift({"diffusion_base_dim": 3072}, settings) == pytest.approx(9.797958971132712)
