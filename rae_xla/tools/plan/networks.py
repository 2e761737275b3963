"""Configurations whose networks can be built without weight files.

A plan builds the networks on torch's meta device. The only file it reads is the encoder's
config.json; without one, the sizes of the published encoder of that name are used.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rae_xla.config import ModelSpec, RunConfig
from rae_xla.config.geometry import encoder_geometry
from rae_xla.config.registry import full_name
from rae_xla.errors import UserError
from rae_xla.tools.plan.language_models import text_to_image_without_weights

# The keys of the published encoders' config.json that determine shapes: DINOv2 with registers
# (Oquab 2023, Darcet 2024), DINOv3 (Siméoni 2025), SigLIP2 (Tschannen 2025), MAE (He 2022).
_DINOV2 = {"model_type": "dinov2_with_registers", "image_size": 518}
_MAE = {"model_type": "vit_mae"}
_SIGLIP = {"model_type": "siglip_vision_model"}
_DINOV3 = {"model_type": "dinov3_vit", "num_register_tokens": 4, "key_bias": False}
_PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    (r"dinov2.*small", _DINOV2 | {"hidden_size": 384, "num_hidden_layers": 12,
                                  "num_attention_heads": 6}),
    (r"dinov2.*base", _DINOV2 | {"hidden_size": 768, "num_hidden_layers": 12,
                                 "num_attention_heads": 12}),
    (r"dinov2.*large", _DINOV2 | {"hidden_size": 1024, "num_hidden_layers": 24,
                                  "num_attention_heads": 16}),
    (r"dinov2.*giant", _DINOV2 | {"hidden_size": 1536, "num_hidden_layers": 40,
                                  "num_attention_heads": 24, "use_swiglu_ffn": True}),
    (r"dinov3-vits16-", _DINOV3 | {"hidden_size": 384, "num_hidden_layers": 12,
                                   "num_attention_heads": 6, "intermediate_size": 1536}),
    (r"dinov3-vitb16-", _DINOV3 | {"hidden_size": 768, "num_hidden_layers": 12,
                                   "num_attention_heads": 12, "intermediate_size": 3072}),
    (r"dinov3-vitl16-", _DINOV3 | {"hidden_size": 1024, "num_hidden_layers": 24,
                                   "num_attention_heads": 16, "intermediate_size": 4096}),
    (r"siglip.*base", _SIGLIP | {"hidden_size": 768, "num_hidden_layers": 12,
                                 "num_attention_heads": 12, "intermediate_size": 3072}),
    (r"siglip.*large", _SIGLIP | {"hidden_size": 1024, "num_hidden_layers": 24,
                                  "num_attention_heads": 16, "intermediate_size": 4096}),
    (r"siglip.*so400m", _SIGLIP | {"hidden_size": 1152, "num_hidden_layers": 27,
                                   "num_attention_heads": 16, "intermediate_size": 4304}),
    (r"mae.*base", _MAE | {"hidden_size": 768, "num_hidden_layers": 12,
                           "num_attention_heads": 12, "intermediate_size": 3072}),
    (r"mae.*large", _MAE | {"hidden_size": 1024, "num_hidden_layers": 24,
                            "num_attention_heads": 16, "intermediate_size": 4096}),
    (r"mae.*huge", _MAE | {"hidden_size": 1280, "num_hidden_layers": 32,
                           "num_attention_heads": 16, "intermediate_size": 5120}),
]  # fmt: skip


def published_encoder(name: str) -> dict[str, Any] | None:
    """Return the config.json of a published encoder, or None if the encoder is unknown.

    Args:
        name: hub id or folder of the encoder.
    """
    geometry = encoder_geometry(name)
    ending = "/".join(Path(name).parts[-2:])
    for pattern, values in _PUBLISHED:
        if geometry is not None and re.search(pattern, ending, re.IGNORECASE):
            side = re.search(r"-(\d{3})$", ending)  # siglip2-base-patch16-256
            image_size = {"image_size": int(side[1]) if side else 224}
            return image_size | values | {"patch_size": geometry.patch_size}
    return None


def without_weights(config: RunConfig, folder: Path) -> tuple[RunConfig, list[str]]:
    """Return a configuration whose networks can be built without weight files.

    Args:
        config: of the run.
        folder: receives a config.json with published sizes if the encoder's own is missing.

    Returns:
        The configuration, and the assumptions made, as sentences.

    Raises:
        UserError: if the encoder has no local config.json and is not a published one.
    """
    config = replace(config, eval=None)
    if config.stage_2 is not None:
        config = replace(config, stage_2=replace(config.stage_2, ckpt=None))
    notes: list[str] = []
    if config.text_to_image is not None:
        section, notes = text_to_image_without_weights(config.text_to_image, folder)
        config = replace(config, text_to_image=section)
    if config.stage_1 is None:
        return config, notes
    params = dict(config.stage_1.params)
    encoder_params = dict(params.get("encoder_params") or {})
    path_key = next((k for k in ("dinov2_path", "model_name") if k in encoder_params), None)
    name = encoder_params[path_key] if path_key else params.get("encoder_config_path")
    name = str(name or "facebook/dinov2-with-registers-base")
    if not (Path(name) / "config.json").is_file():
        values = published_encoder(name)
        if values is None:
            raise UserError(
                f"the encoder {name} has no local config.json and is not a known published "
                "encoder: download the model's folder (its config.json suffices) and set "
                "stage_1.params.encoder_config_path to it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values))
        notes.append(
            f"encoder {name} has its published sizes (its config.json is not available locally)"
        )
        params["encoder_config_path"] = str(folder)
        if path_key:
            params["encoder_params"] = encoder_params | {path_key: str(folder)}
    stage_1 = ModelSpec(full_name(config.stage_1.target), params)
    return replace(config, stage_1=stage_1), notes
