"""The networks of a run without their weights: a plan needs shapes alone.

Everything is built on torch's meta device, where nothing is allocated and no weight file is read.
Of the encoder one file is read, its config.json; where that is not at hand, the published sizes of
the encoder of that name stand in for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rae_xla.config import ModelSpec, RunConfig
from rae_xla.config.geometry import encoder_geometry
from rae_xla.config.targets import full_name
from rae_xla.errors import UserError

# config.json of the published encoders, as far as shapes depend on it: DINOv2 with registers
# (Oquab 2023, Darcet 2024), SigLIP2 (Tschannen 2025), MAE (He 2022).
_DINOV2 = {"model_type": "dinov2_with_registers", "image_size": 518}
_MAE = {"model_type": "vit_mae"}
_SIGLIP = {"model_type": "siglip_vision_model"}
_PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    (r"dinov2.*small", _DINOV2 | {"hidden_size": 384, "num_hidden_layers": 12,
                                  "num_attention_heads": 6}),
    (r"dinov2.*base", _DINOV2 | {"hidden_size": 768, "num_hidden_layers": 12,
                                 "num_attention_heads": 12}),
    (r"dinov2.*large", _DINOV2 | {"hidden_size": 1024, "num_hidden_layers": 24,
                                  "num_attention_heads": 16}),
    (r"dinov2.*giant", _DINOV2 | {"hidden_size": 1536, "num_hidden_layers": 40,
                                  "num_attention_heads": 24, "use_swiglu_ffn": True}),
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
    """The config.json of a published encoder by its hub id or folder name, None if unknown."""
    geometry = encoder_geometry(name)
    ending = "/".join(Path(name).parts[-2:])
    for pattern, values in _PUBLISHED:
        if geometry is not None and re.search(pattern, ending, re.IGNORECASE):
            side = re.search(r"-(\d{3})$", ending)  # siglip2-base-patch16-256
            own = {"image_size": int(side[1])} if side else {"image_size": 224}
            return own | values | {"patch_size": geometry.patch_size}
    return None


def without_weights(config: RunConfig, folder: Path) -> tuple[RunConfig, list[str]]:
    """A configuration whose networks can be built on the meta device here.

    Args:
        config: of the run.
        folder: where to put what stands in for the encoder's folder.

    Returns:
        The configuration, and what was assumed, for people.

    Raises:
        UserError: the encoder's config.json is not here and its name is none of the published.
    """
    config = replace(config, eval=None)
    if config.stage_2 is not None:
        config = replace(config, stage_2=replace(config.stage_2, ckpt=None))
    if config.stage_1 is None:
        return config, []
    params, notes = dict(config.stage_1.params), []
    own = dict(params.get("encoder_params") or {})
    of_the_path = next((k for k in ("dinov2_path", "model_name") if k in own), None)
    name = own[of_the_path] if of_the_path else params.get("encoder_config_path")
    name = str(name or "facebook/dinov2-with-registers-base")
    if not (Path(name) / "config.json").is_file():
        values = published_encoder(name)
        if values is None:
            raise UserError(
                f"the encoder {name} has no config.json here, and its name is none of the "
                "published: fetch the model's folder (its config.json is enough) and name that in "
                "stage_1.params.encoder_config_path"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values))
        notes.append(f"encoder {name}: its published sizes, not its config.json")
        params["encoder_config_path"] = str(folder)
        if of_the_path:
            params["encoder_params"] = own | {of_the_path: str(folder)}
    stage_1 = ModelSpec(full_name(config.stage_1.target), params)
    return replace(config, stage_1=stage_1), notes
