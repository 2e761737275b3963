"""Encoders and decoders of Scale-RAE: golden pixels, features and images."""

from __future__ import annotations

from pathlib import Path

import PIL
import pytest
import torch
from golden_case import GOLDEN, load_case
from PIL import Image

from rae_xla.data.encoder_images import EncoderResize
from rae_xla.errors import UserError
from rae_xla.models.encoders.webssl import WebSSLEncoder
from rae_xla.models.rae import RAE

FOLDER = GOLDEN / "t2i"
RESIZE = {
    "siglip2": EncoderResize(56),
    "webssl": EncoderResize(56, "crop", Image.Resampling.BICUBIC),
}
CLASSES = {"siglip2": "SigLIP2Encoder", "webssl": "WebSSLEncoder"}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def autoencoder(encoder: str, decoder: str, input_size: int = 56) -> RAE:
    return RAE(
        encoder_cls=CLASSES[encoder],
        encoder_config_path=str(FOLDER / "encoder" / encoder / "hf"),
        encoder_input_size=input_size,
        decoder_config_path=FOLDER / "decoder" / decoder,
        decoder_patch_size=14,
        pretrained_decoder_path=str(FOLDER / "decoder" / decoder / "model.pt"),
        noise_tau=0.0,
        reshape_to_2d=False,
    ).eval()


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("siglip2", "siglip2_decoder_grid4"), ("webssl", "webssl300m_decoder_grid4")],
)
def test_pixels_and_features_match_golden_values(encoder: str, decoder: str) -> None:
    case = load_case(f"t2i/encoder/{encoder}/golden")
    rae = autoencoder(encoder, decoder)
    images = [Image.fromarray(case[f"in.image{i}"].numpy()) for i in range(2)]
    pixels = torch.stack([torch.from_numpy(RESIZE[encoder](image).copy()) for image in images])
    unit = pixels.permute(0, 3, 1, 2).float() / 255
    normalised = (unit - rae.encoder_mean) / rae.encoder_std
    # Pillow 12, the last version for Python 3.10, rounds resized pixels otherwise than Pillow 13.
    exact = int(PIL.__version__.split(".")[0]) >= 13
    level = 0 if exact else (1 / 255 / rae.encoder_std).max().item()
    torch.testing.assert_close(normalised, case["out.pixel_values"], atol=1e-6 + level, rtol=1e-6)
    recorded = case["out.pixel_values"] * rae.encoder_std + rae.encoder_mean
    torch.testing.assert_close(rae.encode(recorded), case["out.features"], **CLOSE)


def test_tokens_are_resized_like_golden_values() -> None:
    case = load_case("t2i/encoder/webssl/golden")
    folder = str(FOLDER / "encoder/webssl/hf")
    features = WebSSLEncoder(folder, num_tokens=9)(case["out.pixel_values"])
    torch.testing.assert_close(features, case["out.features_interp9"], **CLOSE)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("siglip2", "siglip2_decoder_grid4"), ("webssl", "webssl300m_decoder_grid4")],
)
def test_decoded_images_match_golden_values(encoder: str, decoder: str) -> None:
    case = load_case(f"t2i/decoder/{decoder}/golden")
    rae = autoencoder(encoder, decoder)
    for name in (n.removeprefix("in.z") for n in case.tensors if n.startswith("in.z")):
        images = rae.decode(case[f"in.z{name}"])
        torch.testing.assert_close(images, case[f"out.image{name}"], **CLOSE)
        # The published code truncates to 8 bit: an image that is off by rounding may differ by 1.
        bytes_ = (images.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
        difference = (bytes_.int() - case[f"out.uint8_{name}"].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3


def test_decoder_of_224_pixels_matches_golden_values() -> None:
    case = load_case("t2i/decoder/siglip2_decoder_224/golden")
    images = autoencoder("siglip2", "siglip2_decoder_224", input_size=224).decode(case["in.z0"])
    assert images.shape[-2:] == (224, 224)
    torch.testing.assert_close(images[..., ::5, ::5], case["out.image0_every_5th"], **CLOSE)


def test_decoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit ViTDecoder"):
        autoencoder("webssl", "siglip2_decoder_grid4")


@pytest.mark.parametrize("name", ["siglip2_decoder", "webssl300m_decoder"])
def test_key_map_of_the_decoder_matches_published_file(name: str) -> None:
    from rae_xla.models.decoder import ViTDecoder

    meta = load_case(f"t2i/keymaps/{name}").meta
    config = meta["config"]
    with torch.device("meta"):
        decoder = ViTDecoder(
            config["decoder_config"], config["num_patches"], hidden_size=config["latent_dim"]
        )
    shapes = {k: list(t.shape) for k, t in decoder.state_dict().items()}
    assert shapes == {k: shape for k, (shape, _) in meta["keys"].items()}
    assert sum(p.numel() for p in decoder.parameters()) == meta["n_params"]
