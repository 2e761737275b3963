"""Provenance of RAEv2's parts: layer lists and the range of the decoder's output."""

from __future__ import annotations

import pytest
import torch
from golden_case import GOLDEN

from rae_xla.errors import UserError
from rae_xla.models.pretrained.manifest import (
    IGNORE,
    check_rae_files,
    rae_manifest,
    rae_parts,
    write_weights_manifest,
)
from rae_xla.models.pretrained.raev2_files import published_layers
from rae_xla.models.rae import RAE

DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def build(decoder_path=None, layers=(1, 3, 5), **options):
    arguments = {
        "encoder_cls": "DINOv3Encoder",
        "encoder_config_path": str(GOLDEN / "raev2/encoders/dinov3"),
        "encoder_input_size": 64,
        "encoder_params": {} if layers is None else {"layers": list(layers)},
        "decoder_config_path": DECODER,
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
        "decoder_output": "pixels",
    } | options
    return RAE(**arguments), arguments | {"pretrained_decoder_path": decoder_path}


@pytest.mark.parametrize(
    ("path", "layers"),
    [
        ("models/stage1/imagenet/dinov3l-k7/decoder.pt", [11, 13, 15, 17, 19, 21, 23]),
        ("stage1/general/dinov3l-k23/stats.pt", list(range(1, 24))),
        ("stage1/imagenet/dinov3b-k11/decoder.pt", list(range(1, 12))),
        ("stage1/imagenet/dinov2l-k1/decoder.pt", []),
        ("decoders/dinov2/wReg_base/ViTXL_n08/model.pt", None),
    ],
)
def test_layers_of_published_files(path, layers):
    assert published_layers(path) == layers


def test_published_decoder_of_other_layers_is_refused():
    rae, arguments = build("stage1/imagenet/dinov3l-k7/decoder.pt")
    with pytest.raises(UserError, match=r"belongs to the layers \[11, .*returns the layers \[1, 3"):
        check_rae_files(rae, arguments)
    rae, arguments = build("stage1/imagenet/dinov3l-k1/decoder.pt", layers=None)
    check_rae_files(rae, arguments)


def test_published_decoder_predicts_pixels(monkeypatch):
    path = "stage1/imagenet/dinov3l-k1/decoder.pt"
    rae, arguments = build(path, layers=None, decoder_output="normalized")
    with pytest.raises(UserError, match=r"set stage_1\.params\.decoder_output to pixels"):
        check_rae_files(rae, arguments)
    monkeypatch.setenv(IGNORE, "1")
    check_rae_files(rae, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 2, 3)}, "created with the encoder .* cannot be used with the encoder"),
        ({"decoder_output": "normalized"}, "trained to predict pixels images, but .* normalized"),
    ],
)
def test_decoder_with_a_manifest_of_another_autoencoder_is_refused(options, message, tmp_path):
    torch.manual_seed(0)
    rae, _ = build()
    path = tmp_path / "decoder.pt"
    torch.save(rae.decoder.state_dict(), path)
    manifest = rae_manifest(rae_parts(rae, "test"), rae.decoder_output).only("decoder")
    write_weights_manifest(path, manifest)
    for changes, fits in (({}, True), (options, False)):
        other, arguments = build(str(path), **changes)
        other.decoder.load_state_dict(rae.decoder.state_dict())
        if fits:
            check_rae_files(other, arguments)
        else:
            with pytest.raises(UserError, match=message):
                check_rae_files(other, arguments)
