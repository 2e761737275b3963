"""The latents an encoder gives, from its config.json or its name: no model is built."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rae_xla.config.model_params import RAEParams
from rae_xla.config.typed import Origin
from rae_xla.errors import UserError

# Patch side and width of the encoders RAEs are made of, by what their names have in common.
# `wReg_base` and `base_p16` are the folder names of the published collection.
_KNOWN = [
    (r"dinov2.*small", 14, 384),
    (r"dinov2.*base", 14, 768),
    (r"dinov2.*large", 14, 1024),
    (r"dinov2.*giant", 14, 1536),
    (r"siglip.*base.*p(?:atch)?(\d+)", None, 768),
    (r"siglip.*large.*p(?:atch)?(\d+)", None, 1024),
    (r"siglip.*so400m.*p(?:atch)?(\d+)", None, 1152),
    (r"mae.*base", 16, 768),
    (r"mae.*large", 16, 1024),
    (r"mae.*huge", 14, 1280),
]


@dataclass(frozen=True)
class EncoderGeometry:
    """What an encoder makes of pixels."""

    patch_size: int
    channels: int


def encoder_geometry(config_path: str) -> EncoderGeometry | None:
    """The geometry of an encoder by its folder or hub id; None where neither tells.

    A local folder's config.json is believed before the name.
    """
    file = Path(config_path) / "config.json"
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            config = config.get("vision_config", config)
            return EncoderGeometry(int(config["patch_size"]), int(config["hidden_size"]))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{file} is no encoder's config.json ({error!r}): it must have patch_size and"
                " hidden_size"
            ) from error
    name = "/".join(Path(config_path).parts[-2:])  # owner/model, or dinov2/wReg_base
    for pattern, patch, channels in _KNOWN:
        match = re.search(pattern, name, re.IGNORECASE)
        if match:
            return EncoderGeometry(patch or int(match[1]), channels)
    return None


def latent_size(rae: RAEParams, origin: Origin) -> tuple[int, int, int] | None:
    """(C, H, W) of the autoencoder's latents, or None where the encoder is not known here.

    Raises:
        UserError: the input size is no multiple of the encoder's patch.
    """
    geometry = encoder_geometry(rae.encoder_config_path)
    if geometry is None:
        return None
    side, rest = divmod(rae.encoder_input_size, geometry.patch_size)
    if rest:
        below = side * geometry.patch_size
        key = "stage_1.params.encoder_input_size"
        raise UserError(
            f"{key} ({origin.of(key)}): {rae.encoder_input_size} is no multiple of the encoder's"
            f" patch, {geometry.patch_size}: write {below} or {below + geometry.patch_size}"
        )
    return geometry.channels, side, side
