"""DINOv3 and layer fusion: features of RAEv2, its autoencoder, options and errors."""

from __future__ import annotations

import json

import pytest
import torch
from golden_case import GOLDEN, load_case
from torch.testing import assert_close

from rae_xla.config.encoder_names import parse_encoder_name
from rae_xla.errors import UserError
from rae_xla.models.decoder import ViTDecoder
from rae_xla.models.encoders import ENCODERS, DINOv3Encoder
from rae_xla.models.rae import RAE
from rae_xla.ops.resize import resize_bicubic

ROOT = GOLDEN.parents[1]
FOLDERS = GOLDEN / "raev2/encoders"
FEATURES = [
    (family, key)
    for family, keys in {
        "dinov3": ("k1", "k1_norm", "mls0", "mls1", "mls2"),
        "siglip2": ("k1", "mls0", "mls1"),
        "dinov2": ("k1", "k1_norm", "mls0", "mls1"),
    }.items()
    for key in keys
]


def build_rae(case, **options):
    """Build the autoencoder of the recorded case."""
    found = parse_encoder_name(case.meta["encoder_name"], 64)
    decoder = case.meta["decoder_config"] | {"num_channels": 3, "patch_size": 16}
    rae = RAE(
        encoder_cls=found.encoder_cls,
        encoder_config_path=str(FOLDERS / "dinov3"),
        encoder_input_size=64,
        encoder_params=found.options,
        decoder_config_path=decoder,
        noise_tau=case.meta["noise_tau"],
        decoder_output="pixels",
        image_mean=found.image_mean,
        image_std=found.image_std,
        **options,
    )
    rae.decoder.load_state_dict(case.under("state.decoder"))
    std = torch.sqrt(case["stat.var"] + case.meta["eps"])
    rae.set_latent_statistics(case["stat.mean"], std)
    return rae


@pytest.mark.parametrize(("family", "key"), FEATURES)
@torch.no_grad()
def test_features_match_golden_values(family, key):
    case = load_case(f"raev2/encoders/{family}_features")
    resolution = case.meta["resolution"]
    found = parse_encoder_name(case.meta["encoder_names"][key], resolution)
    size = found.input_size
    encoder = ENCODERS[found.encoder_cls](str(FOLDERS / family), input_size=size, **found.options)
    images = case["in.images"].float() / (255 if family == "dinov2" else 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (found.image_mean, found.image_std))
    tokens = encoder((resize_bicubic(images, size) - mean) / std)
    assert_close(tokens, case[f"out.tokens.{key}"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_autoencoder_matches_golden_values():
    case = load_case("raev2/encoders/rae_dinov3mls")
    rae = build_rae(case).eval()
    latents = rae.encode(case["in.images"])
    assert_close(latents, case["out.latent"], atol=2e-5, rtol=1e-4)
    assert_close(rae.decode(case["out.latent"]), case["out.decoded"], atol=2e-5, rtol=1e-4)
    other = rae.encode(case["in.images_other_size"])
    assert_close(other, case["out.latent_other_size"], atol=2e-5, rtol=1e-4)
    noised = rae.train().encode(case["in.images"], (case["in.noise_u"], case["in.noise_n"]))
    assert_close(noised, case["out.latent_noised"], atol=2e-5, rtol=1e-4)


def test_decoder_gradients_match_golden_values():
    case = load_case("raev2/encoders/rae_dinov3mls")
    rae = build_rae(case)
    (rae.decode(case["out.latent"]) * case["in.cotangent"]).mean().backward()
    recorded = case.under("grad.decoder")
    assert recorded
    parameters = dict(rae.decoder.named_parameters())
    for name, expected in recorded.items():
        error = (parameters[name].grad - expected).norm()
        assert error <= 1e-3 * expected.norm() + 1e-9, name


def test_encoder_stays_in_eval_mode():
    """RAEv2's does not: it rescales the positions of DINOv3 randomly in stage 1."""
    encoder = DINOv3Encoder(str(FOLDERS / "dinov3"), input_size=64).train()
    assert not any(module.training for module in encoder.modules())


def test_key_map_of_dinov3_large():
    """The parameters of the official file, in the names of transformers."""
    meta = load_case("raev2/keymaps/encoder_dinov3_vitl16_official").meta
    config = json.loads((FOLDERS / "dinov3/config.json").read_text()) | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    with torch.device("meta"):
        encoder = DINOv3Encoder(config, normalize=False, input_size=256)
    shapes = sorted(tuple(p.shape) for p in encoder.parameters())
    official = []
    for name, shape in meta["keys"].items():
        if name in meta["buffers"]:
            continue
        if name.endswith("qkv.weight"):
            official += [(1024, 1024)] * 3
        elif name.endswith("qkv.bias"):
            official += [(1024,)] * 2  # the key has no bias: the published one is masked
        elif name == "mask_token":
            official.append((1, *shape))
        else:
            official.append(tuple(shape))
    assert shapes == sorted(official)


def test_key_map_of_the_decoder():
    meta = load_case("raev2/keymaps/decoder_ViTXL_dinov3l").meta
    config = json.loads((ROOT / "configs/decoder/ViTXL/config.json").read_text())
    with torch.device("meta"):
        decoder = ViTDecoder(config | {"hidden_size": 1024, "patch_size": 16}, num_patches=256)
    found = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert found == meta["keys"]
    assert sum(p.numel() for p in decoder.parameters()) == meta["parameters"]


@pytest.mark.parametrize("family", ["dinov3", "siglip2", "dinov2"])
def test_fusion_is_part_of_the_state(family):
    name = {"dinov3": "DINOv3Encoder", "siglip2": "SigLIP2Encoder", "dinov2": "DINOv2Encoder"}
    build = ENCODERS[name[family]]
    one = build(str(FOLDERS / family), layers=[1, 3], token_mean=True)
    plain = build(str(FOLDERS / family))
    assert one.state_dict().keys() - plain.state_dict().keys() == {"fusion_code"}
    assert one.fusion_code.tolist() == [1, 3, 0, 1]


def test_sum_of_layers():
    images = torch.randn(2, 3, 64, 64)
    folder = str(FOLDERS / "dinov3")
    layers = [DINOv3Encoder(folder, input_size=64, layers=[i])(images) for i in (2, 5)]
    fused = DINOv3Encoder(folder, input_size=64, layers=[2, 5], fusion="sum")(images)
    assert_close(fused, layers[0] + layers[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [6]}, "has the blocks 0 to 5, but not 6"),
        ({"layers": []}, "expected a list of different blocks"),
        ({"layers": [1, 1]}, "expected a list of different blocks"),
        ({"layers": [1], "fusion": "max"}, "'max' is not one of mean, sum"),
        ({"token_mean": True}, "fusion and token_mean require layers"),
    ],
)
def test_invalid_fusion_raises(options, message):
    with pytest.raises(UserError, match=message):
        DINOv3Encoder(str(FOLDERS / "dinov3"), **options)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]", [11, 13, 15, 17, 19, 21, 23]),
        ("dinov3mls-vit-l16", [5, 11, 17, 23]),
        ("dinov3-vit-l16", None),
    ],
)
def test_encoder_names(name, layers):
    found = parse_encoder_name(name, 256)
    assert found.options.get("layers") == layers
    assert found.options.get("token_mean", False) == (layers is not None)
    assert found.hub_id == "facebook/dinov3-vitl16-pretrain-lvd1689m"
    assert found.input_size == 256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov3mls-vit-l16[layers=a]", "is not an encoder name of RAEv2"),
        ("jepa-vit-h", "encoder family jepa of RAEv2 is not supported"),
        ("dinov3-vit-x16", "DINOv3 has no architecture vit-x16"),
    ],
)
def test_unknown_encoder_names_raise(name, message):
    with pytest.raises(UserError, match=message):
        parse_encoder_name(name, 256)
