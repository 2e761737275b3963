"""ViTDecoder: golden values, published keys, configuration and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_case import load_case

from rae_xla.errors import UserError
from rae_xla.models.decoder import DecoderConfig, ViTDecoder

SMALL = {
    "hidden_size": 8,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "patch_size": 2,
}
KEYMAPS = ("decoder_ViTB", "decoder_ViTL", "decoder_ViTXL", "decoder_ViTXL_i512")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=["decoder_a", "decoder_b"])
def golden(request):
    case = load_case(f"rae/{request.param}")
    decoder = ViTDecoder(case.meta["config"], case.meta["num_patches"])
    decoder.load_state_dict(case.under("state"))
    return case, decoder


def test_forward(golden) -> None:
    case, decoder = golden
    logits = decoder(case["in.tokens"])
    close(logits, case["out.logits"])
    close(decoder.unpatchify(logits), case["out.image"])


@pytest.mark.parametrize("size", ["bigger", "smaller"])
def test_other_number_of_tokens_is_resized(golden, size: str) -> None:
    case, decoder = golden
    close(decoder(case[f"in.tokens_{size}"]), case[f"out.logits_{size}"])


def test_drop_cls_token(golden) -> None:
    case, decoder = golden
    actual = decoder(case["in.tokens_with_cls"], drop_cls_token=True)
    close(actual, case["out.logits_drop_cls"])


def test_unpatchify_to_rectangle(golden) -> None:
    case, decoder = golden
    size = tuple(case.meta["rect_image_size"])
    close(decoder.unpatchify(case["out.logits"], size), case["out.unpatchify_rect"])


def test_position_table(golden) -> None:
    case, _ = golden
    fresh = ViTDecoder(case.meta["config"], case.meta["num_patches"])
    close(fresh.decoder_pos_embed, case["init.decoder_pos_embed"])


def test_gradients(golden) -> None:
    case, decoder = golden
    images = decoder.unpatchify(decoder(case["in.tokens"]))
    loss = (images - case["in.target"]).square().mean()
    assert loss.item() == pytest.approx(case.meta["loss"], rel=1e-5)
    loss.backward()
    norms = {k: p.grad.norm().item() for k, p in decoder.named_parameters() if p.requires_grad}
    # The gradient of a key bias is zero up to rounding, because softmax is invariant to it.
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("name", KEYMAPS)
def test_keys_and_shapes_match_published_files(name: str) -> None:
    meta = load_case(f"keymaps/{name}").meta
    config = meta["config"]
    with torch.device("meta"):
        decoder = ViTDecoder(
            config["decoder_config"],
            config["num_patches"],
            hidden_size=config["latent_dim"],
            patch_size=config["decoder_patch_size"],
        )
    keys = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in decoder.state_dict().items()
    }
    assert keys == meta["keys"]
    frozen = [name for name, p in decoder.named_parameters() if not p.requires_grad]
    assert frozen == meta["frozen_by_default"]


def test_configuration_from_folder_file_and_mapping(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL | {"model_type": "vit_mae", "num_hidden_layers": 12}))
    read = [DecoderConfig.read(source) for source in (tmp_path, str(file), SMALL)]
    assert read[0] == read[1] == read[2]
    assert DecoderConfig.read(tmp_path, patch_size=4).patch_size == 4


@pytest.mark.parametrize("option", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_only_in_train_mode(option: str) -> None:
    decoder = ViTDecoder(SMALL | {option: 0.5}, 4)
    plain = ViTDecoder(SMALL, 4)
    plain.load_state_dict(decoder.state_dict())
    tokens = torch.randn(1, 4, 8)
    assert torch.equal(decoder.eval()(tokens), plain.eval()(tokens))
    assert not torch.equal(decoder.train()(tokens), plain(tokens))


def test_settings_change_result() -> None:
    decoder = ViTDecoder(SMALL, 4)
    tokens = torch.randn(1, 4, 8)
    for changes in ({"hidden_act": "quick_gelu"}, {"layer_norm_eps": 0.1}):
        other = ViTDecoder(SMALL | changes, 4)
        other.load_state_dict(decoder.state_dict())
        assert not torch.allclose(other(tokens), decoder(tokens))


@pytest.mark.parametrize(
    ("changes", "num_patches", "message"),
    [
        ({}, 5, "num_patches must be a square number, got 5"),
        ({"patch_size": "SHOULD BE RELOADED"}, 4, "patch_size must be a positive integer"),
        ({"decoder_num_hidden_layers": 0}, 4, "decoder_num_hidden_layers must be a positive"),
        ({"decoder_num_attention_heads": 3}, 4, "not divisible by 3 attention heads"),
        ({"decoder_hidden_size": 18, "decoder_num_attention_heads": 1}, 4, "multiple of 4"),
        ({"hidden_act": "gleu"}, 4, "unknown hidden_act 'gleu'"),
    ],
)
def test_invalid_settings_raise(changes, num_patches: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViTDecoder(SMALL | changes, num_patches)


def test_error_names_missing_or_broken_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/config\.json does not exist"):
        ViTDecoder(tmp_path / "nowhere", 4)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        ViTDecoder(tmp_path, 4)


def test_mismatched_tokens_and_patches_raise() -> None:
    decoder = ViTDecoder(SMALL, 4)
    with pytest.raises(UserError, match=r"tokens of shape \(batch, N, 8\), got \(1, 4, 9\)"):
        decoder(torch.zeros(1, 4, 9))
    with pytest.raises(UserError, match="number of tokens must be a square number, got 5"):
        decoder(torch.zeros(1, 5, 8))
    with pytest.raises(UserError, match="do not fill an image"):
        decoder.unpatchify(torch.zeros(1, 4, 12), (4, 6))
