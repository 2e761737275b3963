"""Shape of an encoder's latents, derived from its config.json or name without building it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rae_xla.config.model_params import RAEParams
from rae_xla.config.typed import Origin
from rae_xla.errors import UserError

# Name pattern, patch side in pixels (None: the number in the name) and width of published encoders.
# `wReg_base` and `base_p16` are folder names of the published RAE collection.
_KNOWN_ENCODERS = [
    (r"dinov3-vits(\d+)-", None, 384),
    (r"dinov3-vits(\d+)plus-", None, 384),
    (r"dinov3-vitb(\d+)-", None, 768),
    (r"dinov3-vitl(\d+)-", None, 1024),
    (r"dinov3-vith(\d+)plus-", None, 1280),
    (r"dinov3-vit7b(\d+)-", None, 4096),
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
    """Shape of an encoder's tokens.

    Attributes:
        patch_size: side of the pixels that one token covers.
        channels: width of a token.
    """

    patch_size: int
    channels: int


def encoder_geometry(config_path: str) -> EncoderGeometry | None:
    """Return the geometry of an encoder, or None if it is unknown.

    Args:
        config_path: local folder or hub id of the encoder. The ``config.json`` of a local folder
            takes precedence over the name.

    Raises:
        UserError: if ``config.json`` has no patch or hidden size.
    """
    file = Path(config_path) / "config.json"
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            config = config.get("vision_config", config)
            return EncoderGeometry(int(config["patch_size"]), int(config["hidden_size"]))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{file} is not the config.json of an encoder ({error!r}): it must have patch_size"
                " and hidden_size"
            ) from error
    name = "/".join(Path(config_path).parts[-2:])  # owner/model, or dinov2/wReg_base
    for pattern, patch, channels in _KNOWN_ENCODERS:
        match = re.search(pattern, name, re.IGNORECASE)
        if match:
            return EncoderGeometry(patch or int(match[1]), channels)
    return None


def latent_size(rae: RAEParams, origin: Origin) -> tuple[int, int, int] | None:
    """Return (C, H, W) of the autoencoder's latents, or None if the encoder is unknown.

    Raises:
        UserError: if the input size is not a multiple of the encoder's patch size.
    """
    geometry = encoder_geometry(rae.encoder_config_path)
    if geometry is None:
        return None
    side, rest = divmod(rae.encoder_input_size, geometry.patch_size)
    if rest:
        smaller = side * geometry.patch_size
        key = "stage_1.params.encoder_input_size"
        raise UserError(
            f"{key} ({origin.describe(key)}): {rae.encoder_input_size} is not a multiple of the"
            f" encoder's patch size {geometry.patch_size}: write {smaller} or"
            f" {smaller + geometry.patch_size}"
        )
    return geometry.channels, side, side
