"""What the published files of RAEv2 require of the autoencoder that uses them.

They have no manifests, but their paths tell which layers of which encoder they belong to: in
``stage1/imagenet/dinov3l-k7``, k7 is a set of seven layers. A decoder and latents of different sets
have the same shapes, and give images with no meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rae_xla.errors import UserError
from rae_xla.models.pretrained.components import AutoencoderBase

REPOSITORY = "nyu-visionx/RAEv2-models"
FILE_KEYS = ("pretrained_decoder_path", "normalization_stat_path")
_PATH = re.compile(r"(dinov[23])([bl])-k(\d+)/(?:decoder|stats)\.pt$")
_DEPTHS = {"b": 12, "l": 24}


def published_layers(path: str) -> list[int] | None:
    """Return the layers, counted from 0, of a published decoder or of published statistics.

    Returns:
        The layers, or an empty list for the last one alone (k1); None for another file.
    """
    match = _PATH.search(path)
    if match is None:
        return None
    depth, count = _DEPTHS[match[2]], int(match[3])
    if count == 1:
        return []
    if count == depth - 1:
        return list(range(1, depth))
    # K = 7 of 24 blocks: every second one up to the last.
    return list(range(depth - 1, depth - 1 - 2 * count, -2))[::-1]


def check_raev2_files(rae: AutoencoderBase, params: Mapping[str, Any]) -> None:
    """Raise if files of RAEv2 are used with other layers, or with another range of the decoder.

    Args:
        rae: built with ``params``.
        params: its constructor arguments.

    Raises:
        UserError: see above.
    """
    fusion = getattr(rae.encoder, "fusion", None)
    own = [] if fusion is None else list(fusion.layers)
    for key in FILE_KEYS:
        path = params.get(key)
        layers = None if path is None else published_layers(str(path))
        if layers is None:
            continue
        if layers != own:
            raise UserError(
                f"{key}: {path} belongs to {_describe(layers)}, but the encoder returns "
                f"{_describe(own)}: set encoder_params.layers to those of the file, or choose the "
                "file of these layers"
            )
        if key == FILE_KEYS[0] and rae.decoder_output != "pixels":
            raise UserError(
                f"{key}: {path} is a decoder of RAEv2, which predicts pixels, but decoder_output "
                f"is {rae.decoder_output}: set stage_1.params.decoder_output to pixels"
            )


def _describe(layers: list[int]) -> str:
    return f"the layers {layers}" if layers else "the last layer"
