"""The generic encoder: tokens of transformers' own models, sizes, options and errors."""

from __future__ import annotations

import pytest
import torch
from hf_encoders import MODELS, save_model
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from rae_xla.errors import UserError
from rae_xla.models.encoders import HFVisionEncoder
from rae_xla.models.encoders.frozen import DINOv2Encoder, MAEEncoder, SigLIP2Encoder
from rae_xla.models.rae import RAE

EXTRA = {"dinov2": 1, "dinov2_registers": 3, "webssl": 1, "clip": 1, "mae": 1, "dinov3": 3}


def own_hidden_states(model, name, images):
    """Return the outputs of all blocks as hooks of transformers' model see them."""
    outputs = []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    handles = [
        b.register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for b in blocks
    ]
    options = {}
    if name == "mae":  # its own class permutes the tokens by this noise
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(16).float().expand(len(images), -1)
    model(pixel_values=images, **options)
    for handle in handles:
        handle.remove()
    return [out[:, EXTRA.get(name, 0) :] for out in outputs]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_are_those_of_transformers(name, tmp_path):
    model = save_model(name, tmp_path)
    side = model.config.image_size
    images = torch.randn(2, 3, side, side)
    encoder = HFVisionEncoder(str(tmp_path), layers=[0, 2], token_mean=True)
    eps = model.config.layer_norm_eps
    states = own_hidden_states(model, name, images)
    width = model.config.hidden_size
    normed = [layer_norm(states[i], (width,), eps=eps) for i in (0, 2)]
    expected = (normed[0] + normed[1]) / 2 + normed[1].mean(1, keepdim=True)
    assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    plain = HFVisionEncoder(str(tmp_path), final_norm="none", drop_tokens=EXTRA.get(name, 0))
    assert_close(plain(images), states[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dinov2_registers", DINOv2Encoder),
        ("mae", MAEEncoder),
        ("siglip2_base", SigLIP2Encoder),
    ],
)
@torch.no_grad()
def test_other_image_size_equals_our_own_encoder(name, own, tmp_path):
    save_model(name, tmp_path)
    images = torch.randn(2, 3, 48, 48)
    expected = own(str(tmp_path), input_size=48)(images)
    found = HFVisionEncoder(str(tmp_path), input_size=48)(images)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_final_norm_of_clip_is_that_of_its_class_token(tmp_path):
    model = save_model("clip", tmp_path)
    images = torch.randn(2, 3, 32, 32)
    last = own_hidden_states(model, "clip", images)[2]
    norm = next(m for n, m in model.named_modules() if n.endswith("post_layernorm"))
    found = HFVisionEncoder(str(tmp_path), final_norm="model")(images)
    assert_close(found, norm(last), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "siglip2_base", "mae", "dinov3"])
@torch.no_grad()
def test_final_norm_of_the_model(name, tmp_path):
    model = save_model(name, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    options = {}
    if name == "mae":
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(16).float().expand(2, -1)
    last = model(pixel_values=images, **options).last_hidden_state[:, EXTRA.get(name, 0) :]
    found = HFVisionEncoder(str(tmp_path), final_norm="model")(images)
    assert_close(found, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dinov2_registers", "siglip2_base", "dinov3"])
@torch.no_grad()
def test_saved_autoencoder_is_read_back(name, tmp_path):
    save_model(name, tmp_path / "encoder")
    rae = RAE(
        encoder_cls="HFVisionEncoder",
        encoder_config_path=str(tmp_path / "encoder"),
        encoder_input_size=32,
        encoder_params={"layers": [0, 2], "final_norm": "model"},
        decoder_config_path={
            "decoder_hidden_size": 24,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        decoder_output="pixels",
        noise_tau=0.0,
    ).eval()
    rae.save_pretrained(tmp_path / "saved")
    loaded = RAE.from_pretrained(tmp_path / "saved")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(images), rae(images))
    assert loaded.decoder_output == "pixels"
    assert loaded.encoder.fusion == rae.encoder.fusion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_norm": "modle"}, "'modle' is not one of plain, model, none.*did you mean"),
        ({"layers": [3]}, "has the blocks 0 to 2, but not 3"),
        ({"input_size": 4}, "smaller than a patch"),
    ],
)
def test_invalid_options_raise(options, message, tmp_path):
    save_model("dinov2", tmp_path)
    with pytest.raises(UserError, match=message):
        HFVisionEncoder(str(tmp_path), **options)


def test_wrong_number_of_dropped_tokens_raises(tmp_path):
    save_model("dinov2", tmp_path)
    encoder = HFVisionEncoder(str(tmp_path), drop_tokens=5)
    with pytest.raises(UserError, match="has 17 tokens for 16 patches, but drop_tokens is 5"):
        encoder(torch.randn(1, 3, 32, 32))


def test_language_model_is_refused():
    with pytest.raises(UserError, match="is not a vision transformer"):
        HFVisionEncoder({"model_type": "gpt2"})
