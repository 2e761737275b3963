"""Encoders against the forward passes of the installed version of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.encoders import DINOv2Encoder, MAEEncoder, SigLIP2Encoder, read_image_statistics

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 35,
    "patch_size": 7,
}


def randomise(model: nn.Module) -> None:
    """Set every parameter to random values, including those that are initialised to 0 or 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean=offset, std=0.3)


def save(model: transformers.PreTrainedModel, folder: Path) -> str:
    randomise(model)
    model.save_pretrained(folder)
    return str(folder)


def dinov2(**changes) -> transformers.PreTrainedModel:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, **changes)
    return transformers.Dinov2WithRegistersModel(config).eval()


def mae(**changes) -> transformers.PreTrainedModel:
    config = transformers.ViTMAEConfig(**SIZES, intermediate_size=24, mask_ratio=0.0, **changes)
    return transformers.ViTMAEModel(config).eval()


def siglip(**changes) -> transformers.PreTrainedModel:
    config = transformers.SiglipVisionConfig(**SIZES, intermediate_size=24, **changes)
    return transformers.SiglipVisionModel(config).eval()


def without_affine(norm: nn.LayerNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# The model's own grid; fewer patches; more patches; not square.
GRIDS = [(35, 35), (28, 28), (49, 49), (28, 42)]


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_swiglu_ffn": True},
        {"num_register_tokens": 2, "qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=["plain", "swiglu", "options"],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_dinov2_equals_transformers(tmp_path: Path, size, changes, normalize: bool) -> None:
    reference = dinov2(**changes)
    encoder = DINOv2Encoder(save(reference, tmp_path), normalize=normalize)
    if normalize:
        without_affine(reference.layernorm)
    with torch.no_grad():
        expected = reference(images(size)).last_hidden_state
        actual = encoder(images(size))
    first = 1 + reference.config.num_register_tokens
    torch.testing.assert_close(actual, expected[:, first:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", GRIDS)
def test_mae_equals_transformers(tmp_path: Path, size) -> None:
    reference = mae()
    encoder = MAEEncoder(save(reference, tmp_path))
    without_affine(reference.layernorm)
    count = (size[0] // 7) * (size[1] // 7)
    order = torch.arange(count, dtype=torch.float32).expand(2, -1)
    with torch.no_grad():
        expected = reference(images(size), noise=order, interpolate_pos_encoding=True)
        actual = encoder(images(size))
    torch.testing.assert_close(actual, expected.last_hidden_state[:, 1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", GRIDS)
def test_siglip_equals_transformers(tmp_path: Path, size) -> None:
    reference = siglip()
    encoder = SigLIP2Encoder(save(reference, tmp_path), num_tokens=256)
    # Older versions of transformers nest the tower one level deeper.
    tower = getattr(reference, "vision_model", reference)
    without_affine(tower.post_layernorm)
    with torch.no_grad():
        expected = reference(images(size), interpolate_pos_encoding=True).last_hidden_state
        actual = encoder(images(size))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_class", ["ViTMAEForPreTraining", "SiglipModel"])
def test_backbone_is_found_in_larger_model(tmp_path: Path, model_class: str) -> None:
    torch.manual_seed(0)
    if model_class == "SiglipModel":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.SiglipConfig(
            text_config=text | {"intermediate_size": 16, "vocab_size": 8},
            vision_config=SIZES | {"intermediate_size": 24},
        )
        transformers.SiglipModel(config).save_pretrained(tmp_path)
        state = SigLIP2Encoder(str(tmp_path)).state_dict()
        stored, mine = "vision_model.encoder.layers.1.mlp.fc1.weight", "model.encoder.layers.1.mlp"
        mine += ".fc1.weight"
    else:
        transformers.ViTMAEForPreTraining(mae().config).save_pretrained(tmp_path)
        state = MAEEncoder(str(tmp_path)).state_dict()
        stored = "vit.encoder.layer.1.output.dense.weight"
        mine = "model.encoder.layer.1.output.dense.weight"
    assert torch.equal(state[mine], load_file(tmp_path / "model.safetensors")[stored])


def test_sharded_and_torch_files(tmp_path: Path) -> None:
    full = dinov2()
    expected = DINOv2Encoder(save(full, tmp_path / "full"))(images((35, 35)))

    full.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert torch.equal(DINOv2Encoder(str(tmp_path / "sharded"))(images((35, 35))), expected)

    weights = tmp_path / "full" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "full" / "pytorch_model.bin")
    weights.unlink()
    assert torch.equal(DINOv2Encoder(str(tmp_path / "full"))(images((35, 35))), expected)


def test_hub_id_is_read_from_cache_offline(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--mae" / "snapshots" / "0123abc"
    save(mae(), snapshot)
    weights = snapshot / "model.safetensors"
    torch.save(
        load_file(weights), snapshot / "pytorch_model.bin"
    )  # the last file name that is tried
    weights.unlink()
    (tmp_path / "models--owner--mae" / "refs").mkdir()
    (tmp_path / "models--owner--mae" / "refs" / "main").write_text("0123abc")
    program = (
        "from rae_xla.models.encoders import MAEEncoder\n"
        "print(MAEEncoder('owner/mae').hidden_size)\n"
        "MAEEncoder('owner/other')\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "16\n"
    assert "UserError: cannot download config.json of owner/other" in done.stderr


def test_positions_are_resampled_after_loading_weights(tmp_path: Path) -> None:
    first = dinov2()
    encoder = DINOv2Encoder(save(first, tmp_path / "a"), input_size=28)
    nn.init.normal_(first.embeddings.position_embeddings)
    first.save_pretrained(tmp_path / "b")
    other = DINOv2Encoder(str(tmp_path / "b"), input_size=28)
    assert not torch.equal(encoder(images((28, 28))), other(images((28, 28))))
    encoder.load_state_dict(other.state_dict())
    assert torch.equal(encoder(images((28, 28))), other(images((28, 28))))


def test_encoders_stay_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    encoder = MAEEncoder(save(mae(), tmp_path)).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_forward_does_not_resample_positions(tmp_path: Path) -> None:
    encoder = DINOv2Encoder(save(dinov2(), tmp_path), input_size=28)
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compile(encoder, fullgraph=True, backend=backend)(images((28, 28)))
    assert seen
    assert not any("interpolate" in name or "upsample" in name for name in seen)


def test_image_statistics_of_both_file_names(tmp_path: Path) -> None:
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    expected = (values["image_mean"], values["image_std"])
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert read_image_statistics(str(tmp_path)) == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert read_image_statistics(str(tmp_path)) == expected
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no preprocessor_config\.json with image_mean"):
        read_image_statistics(str(tmp_path))


def test_error_names_unusable_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        DINOv2Encoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        DINOv2Encoder(str(tmp_path))
    folder = save(mae(), tmp_path / "mae")
    with pytest.raises(UserError, match="has model_type 'vit_mae'"):
        DINOv2Encoder(folder)
    (tmp_path / "mae" / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        MAEEncoder(folder)
    (tmp_path / "mae" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="contains no weights"):
        MAEEncoder(folder)


def test_error_names_invalid_configuration_value(tmp_path: Path) -> None:
    folder = save(mae(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match=r"config\.json of .* is not valid: .*hidden_size"):
        MAEEncoder(folder)


def test_error_names_mismatched_weights(tmp_path: Path) -> None:
    folder = save(dinov2(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.2.norm1.bias"] = weights.pop("encoder.layer.1.norm1.bias")
    weights["embeddings.cls_token"] = torch.zeros(1, 1, 4)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        DINOv2Encoder(folder)
    message = str(caught.value)
    assert "missing encoder.layer.1.norm1.bias" in message
    assert "unexpected encoder.layer.2.norm1.bias" in message
    assert "embeddings.cls_token is (1, 1, 4), expected (1, 1, 16)" in message
    assert str(tmp_path) in message
