"""Autoencoders with an encoder class that is not a published one: saving, loading, errors."""

import json
from collections.abc import Mapping

import pytest
import torch
from golden_case import GOLDEN
from torch import nn

from rae_xla import RAE
from rae_xla.errors import UserError
from rae_xla.models.encoders import ENCODERS, FrozenEncoder
from rae_xla.models.pretrained.components import rae_to_components
from rae_xla.models.pretrained.diffusers_folder import write_diffusers


class PatchEncoder(FrozenEncoder):
    """One convolution over patches, scaled; with batch norm, which differs in train mode."""

    def __init__(self, folder, input_size=None, scale=1.0):
        config = folder if isinstance(folder, Mapping) else json.loads((folder).read_text())
        super().__init__(config, config["hidden_size"], config["patch_size"])
        self.patches = nn.Conv2d(3, self.hidden_size, self.patch_size, self.patch_size)
        self.norm = nn.BatchNorm2d(self.hidden_size)
        self.scale = scale
        self.requires_grad_(False)

    def forward(self, images):
        return self.scale * self.norm(self.patches(images)).flatten(2).mT


class BufferEncoder(PatchEncoder):
    """Has a tensor that is not in its state dict."""

    def __init__(self, folder, input_size=None):
        super().__init__(folder, input_size)
        self.register_buffer("offset", torch.ones(1), persistent=False)


@pytest.fixture
def build(monkeypatch):
    for cls in (PatchEncoder, BufferEncoder):
        monkeypatch.setitem(ENCODERS, cls.__name__, cls)

    def build(cls, **options):
        with torch.device("meta"):
            rae = RAE(
                encoder_cls=cls.__name__,
                encoder_config_path={"hidden_size": 16, "patch_size": 8},
                encoder_input_size=32,
                encoder_params=options,
                decoder_config_path=str(GOLDEN / "rae/dinov2/decoder_config"),
                decoder_patch_size=8,
            )
        rae = rae.to_empty(device="cpu").eval()
        for tensor in (*rae.parameters(), *rae.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.uniform_(tensor, 0.1, 0.2)
        return rae

    return build


def test_round_trip_keeps_the_options_of_the_encoder(build, tmp_path):
    rae = build(PatchEncoder, scale=2.0)
    assert not rae.encoder.norm.training
    rae.save_pretrained(tmp_path / "rae")
    loaded = RAE.from_pretrained(tmp_path / "rae")
    assert loaded.encoder.scale == 2.0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), rae.encode(images))


def test_a_tensor_outside_the_state_dict_is_an_error(build, tmp_path):
    build(BufferEncoder).save_pretrained(tmp_path / "rae")
    with pytest.raises(UserError, match=r"offset of BufferEncoder.*persistent"):
        RAE.from_pretrained(tmp_path / "rae")


def test_an_unregistered_class_is_an_error(build, tmp_path, monkeypatch):
    rae = build(PatchEncoder)
    rae.save_pretrained(tmp_path / "rae")
    monkeypatch.delitem(ENCODERS, "PatchEncoder")
    with pytest.raises(UserError, match="PatchEncoder is not registered"):
        rae.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"PatchEncoder.*register it"):
        RAE.from_pretrained(tmp_path / "rae")


def test_other_layouts_refuse_the_class(build, tmp_path):
    with pytest.raises(UserError, match="diffusers layout has no encoder class PatchEncoder"):
        write_diffusers(rae_to_components(build(PatchEncoder)), tmp_path)
