"""Tiny models of transformers with random weights, saved in Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8}
MODELS = {
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**SMALL, image_size=32, mlp_ratio=2)
    ),
    "dinov2_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            **SMALL, image_size=32, mlp_ratio=2, num_register_tokens=2
        )
    ),
    # WebSSL is DINOv2 without registers, with other sizes.
    "webssl": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**SMALL, image_size=24, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "siglip2_base": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SMALL, image_size=32, intermediate_size=48)
    ),
    # SO400M: heads of 72 channels rather than 64, and an intermediate size that 8 does not divide.
    "siglip2_so400m": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            **(SMALL | {"hidden_size": 36}), image_size=32, intermediate_size=54
        )
    ),
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**SMALL, image_size=32, intermediate_size=48)
    ),
    "mae": lambda: transformers.ViTMAEModel(
        transformers.ViTMAEConfig(**SMALL, image_size=32, intermediate_size=48)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            **SMALL, image_size=32, intermediate_size=48, num_register_tokens=2
        )
    ),
}


def save_model(name: str, folder: Path) -> torch.nn.Module:
    """Save a random model with an image processor; return it in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        scale = 1 if "position" in key else 0.1
        torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model
