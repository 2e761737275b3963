"""Diffusion transformers in the layout of RAEv2: read, inferred, converted, written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.pretrained.dit_layouts import is_raev2, to_raev2

SHARED = {
    "input_size": 4,
    "in_channels": 8,
    "num_classes": 5,
    "conditioning": "tokens",
    "num_t_tokens": 2,
    "num_c_tokens": 3,
    "use_qknorm": True,
    "use_pos_embed": False,
}
MODELS = {
    "DiTDH": lambda **more: DiTDH(
        hidden_size=[32, 48], depth=[2, 1], num_heads=[4, 4], **SHARED, **more
    ),
    "LightningDiT": lambda **more: LightningDiT(
        hidden_size=32, depth=2, num_heads=4, **SHARED, **more
    ),
}


def published(path, **more):
    """Write a DiTDH in RAEv2's form of a checkpoint; return the model."""
    torch.manual_seed(0)
    model = MODELS["DiTDH"](**more).eval()
    torch.save({"ema": to_raev2(model.state_dict())}, path)
    return model


def same_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_inferred(name, tmp_path):
    model = MODELS[name]()
    torch.save(to_raev2(model.state_dict()), tmp_path / "model.pt")
    loaded = type(model).from_pretrained(tmp_path / "model.pt")
    same_states(loaded.state_dict(), model.state_dict())
    assert loaded.settings["num_c_tokens"] == 3


def test_depth_of_a_base_head_is_not_in_the_weights(tmp_path):
    published(tmp_path / "model.pt", base_model_depth=1)
    with pytest.raises(UserError, match=r"block that base_final_layer reads is unknown.*--config"):
        DiTDH.from_pretrained(tmp_path / "model.pt")


def test_configuration_loads_the_published_file(tmp_path):
    model = published(tmp_path / "checkpoint.pt", base_model_depth=1)
    spec = {
        "target": "stage2.models.DDT.DiTwDDTHeadIG",
        "params": model.settings,
        "ckpt": str(tmp_path / "checkpoint.pt"),
    }
    same_states(instantiate(spec).state_dict(), model.state_dict())


def test_incomplete_file_is_refused(tmp_path):
    model = MODELS["DiTDH"]()
    state = to_raev2(model.state_dict())
    del state["blocks.1.mlp.w2.weight"]
    torch.save(state, tmp_path / "model.pt")
    spec = {"target": "DiTDH", "params": model.settings, "ckpt": str(tmp_path / "model.pt")}
    with pytest.raises(UserError, match=r"missing blocks\.1\.mlp\.w12\.weight; unexpected blocks"):
        instantiate(spec)


@pytest.mark.parametrize("layout", ["published", "safetensors"])
def test_convert_writes_the_layout_of_raev2(layout, tmp_path):
    model = published(tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "folder")
    suffix = ".pt" if layout == "published" else ".safetensors"
    out = tmp_path / f"out{suffix}"
    arguments = ["convert", str(tmp_path / "folder"), "--to", layout, "--out", str(out)]
    assert main(arguments) == 0
    state = load_file(out) if layout == "safetensors" else torch.load(out, weights_only=True)
    assert is_raev2(state)
    same_states(state, to_raev2(model.state_dict()))
    same_states(DiTDH.from_pretrained(out).state_dict(), model.state_dict())


def test_saved_folder_is_read_back(tmp_path):
    model = MODELS["DiTDH"](base_model_depth=2, repa_layer_depth=1, z_dim=4)
    model.save_pretrained(tmp_path / "folder")
    loaded = DiTDH.from_pretrained(tmp_path / "folder")
    same_states(loaded.state_dict(), model.state_dict())
    assert loaded.base_model_depth == 2
