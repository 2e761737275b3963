"""Tiny model with random weights, written as the same files as a published model.

It needs no download and generates noise. It tests an installation, and every step from model files
to images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from rae_xla.interop.instantiate import instantiate
from rae_xla.models.encoders import DINOv2Encoder
from rae_xla.models.weights import write_torch_file

_GRID, _WIDTH = 4, 32


def write_tiny_model(folder: Path) -> Path:
    """Write an encoder, decoder, latent statistics and DiT-DH with random weights.

    Args:
        folder: an existing folder.

    Returns:
        The configuration file of the model: 1,000 classes, latents of 32 x 4 x 4, images of 64
        pixels a side.
    """
    tree = _config_tree(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write_encoder(folder / "encoder")
        files = {key: tree["stage_1"]["params"].pop(key) for key in _FILES}
        rae: Any = instantiate(tree["stage_1"])
        write_torch_file(rae.decoder.state_dict(), Path(files["pretrained_decoder_path"]))
        shape = rae.latent_size
        statistics = {"mean": torch.zeros(shape), "var": torch.ones(shape)}
        write_torch_file(statistics, Path(files["normalization_stat_path"]))
        ckpt = tree["stage_2"].pop("ckpt")
        model = instantiate(tree["stage_2"])
        write_torch_file(_randomise_zeros(model).state_dict(), Path(ckpt))
    tree["stage_1"]["params"].update(files)
    tree["stage_2"]["ckpt"] = ckpt
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


_FILES = ("pretrained_decoder_path", "normalization_stat_path")


def _config_tree(folder: Path) -> dict[str, Any]:
    encoder = str(folder / "encoder")
    decoder = {
        "decoder_hidden_size": _WIDTH,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 2 * _WIDTH,
    }
    autoencoder = {
        "encoder_cls": "Dinov2withNorm",
        "encoder_config_path": encoder,
        "encoder_input_size": 14 * _GRID,
        "encoder_params": {"dinov2_path": encoder, "normalize": True},
        "decoder_config_path": decoder,
        "decoder_patch_size": 16,
        "noise_tau": 0.0,
        "pretrained_decoder_path": str(folder / "decoder.pt"),
        "normalization_stat_path": str(folder / "stat.pt"),
    }
    denoiser = {
        "input_size": _GRID,
        "in_channels": _WIDTH,
        "hidden_size": [_WIDTH, 48],
        "depth": [2, 1],
        "num_heads": [4, 4],
        "num_classes": 1000,
    }
    return {
        "stage_1": {"target": "stage1.RAE", "params": autoencoder},
        "stage_2": {"target": "DiTDH", "params": denoiser, "ckpt": str(folder / "stage2_model.pt")},
        "misc": {"time_dist_shift_base": 64},
    }


def _write_encoder(folder: Path) -> None:
    """Write a DINOv2 with registers and its image processor as transformers saves them."""
    from transformers import Dinov2WithRegistersConfig

    Dinov2WithRegistersConfig(
        hidden_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=14 * _GRID,
        patch_size=14,
        mlp_ratio=2,
    ).save_pretrained(folder)
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    with torch.device("meta"):  # only names and shapes are needed
        encoder = DINOv2Encoder(str(folder), normalize=False)
    weights = {
        name.removeprefix("encoder."): 0.05 * torch.randn(tensor.shape)
        for name, tensor in encoder.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")


def _randomise_zeros(model: nn.Module) -> nn.Module:
    """Replace zero-initialised parameters and label embeddings by random values.

    Without this, neither the class nor guidance would change a pixel.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.3)
            elif "y_embedder" in name:
                parameter.normal_()
    return model
