"""The RAE decoder: a ViT that turns encoder tokens into image patches (RAE, section 3)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.embeddings import sincos_positions
from rae_xla.models.resize import resize_bilinear
from rae_xla.models.vit import ViTMAELayer, ViTShape


@dataclass(frozen=True)
class DecoderConfig:
    """The part of a Hugging Face ``vit_mae`` configuration that describes a decoder.

    Field names and defaults are theirs. ``hidden_size`` is the width of the latent tokens and
    ``patch_size`` the side of a decoded patch in pixels.
    """

    hidden_size: int = 768
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    patch_size: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise UserError(
                    f"decoder configuration: {field.name} must be a positive whole number, "
                    f"got {value!r}"
                )

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], **changes: Any) -> DecoderConfig:
        """Read a ``config.json``, the folder that holds one, or a mapping; ``changes`` win.

        Keys that do not concern the decoder are passed over.

        Raises:
            UserError: if there is no such file, it is not JSON, or a value makes no sense.
        """
        values = source if isinstance(source, Mapping) else _read_json(Path(source))
        known = {field.name for field in fields(cls)}
        return cls(**{**{k: v for k, v in values.items() if k in known}, **changes})

    @property
    def block(self) -> ViTShape:
        """Sizes and options of one decoder block."""
        return ViTShape(
            width=self.decoder_hidden_size,
            num_heads=self.decoder_num_attention_heads,
            mlp_width=self.decoder_intermediate_size,
            norm_eps=self.layer_norm_eps,
            qkv_bias=self.qkv_bias,
            activation=self.hidden_act,
            dropout=self.hidden_dropout_prob,
            attention_dropout=self.attention_probs_dropout_prob,
        )


def _read_json(path: Path) -> dict[str, Any]:
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise UserError(
            f"decoder_config_path: there is no {file}; give a folder that holds the config.json "
            "of a vit_mae model"
        )
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"decoder_config_path: {file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"decoder_config_path: {file} must hold a JSON object of settings")
    return values


class ViTDecoder(nn.Module):
    """Vision-transformer decoder, published as ``GeneralDecoder``; state-dict keys as published.

    ``decoder_pos_embed`` (1, 1 + num_patches, width) is a parameter that is not trained by default.

    Args:
        config: a ``DecoderConfig``, a ``config.json``, the folder that holds it, or a mapping.
        num_patches: tokens of the square grid the decoder works on.
        **changes: settings that replace those of ``config`` (``hidden_size``, ``patch_size`` …).

    Raises:
        UserError: if ``num_patches`` is not a square, or the configuration makes no sense.
    """

    def __init__(
        self,
        config: DecoderConfig | str | Path | Mapping[str, Any],
        num_patches: int,
        **changes: Any,
    ) -> None:
        super().__init__()
        if not isinstance(config, DecoderConfig):
            config = DecoderConfig.read(config, **changes)
        self.config = config
        self.num_patches = num_patches
        self.grid = _square_side(num_patches, "num_patches")
        width = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        positions = sincos_positions(width, self.grid, cls_token=True)
        self.decoder_pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(
            ViTMAELayer(config.block) for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(self, tokens: Tensor, drop_cls_token: bool = False) -> Tensor:
        """Decode tokens (B, N, hidden_size) to patches (B, num_patches, patch_size² · channels).

        N other than ``num_patches`` must be a square: the embedded tokens are then resized
        bilinearly to the decoder's own grid. ``drop_cls_token`` ignores the first token.

        Raises:
            UserError: if the tokens have another width, or N is not a square.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.hidden_size:
            raise UserError(
                f"the decoder takes tokens of shape (batch, N, {self.config.hidden_size}), "
                f"got {tuple(tokens.shape)}"
            )
        x = self.decoder_embed(tokens[:, 1:] if drop_cls_token else tokens)
        x = self._to_own_grid(x)
        x = torch.cat([self.trainable_cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def unpatchify(self, patches: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Lay patches (B, N, patch_size² · channels) out as images (B, channels, H, W).

        ``image_size`` is (H, W) in pixels; a square grid of patches when None.

        Raises:
            UserError: if N patches do not fill the image.
        """
        size, channels = self.config.patch_size, self.config.num_channels
        count = patches.shape[1]
        if image_size is None:
            side = _square_side(count, "the number of patches")
            rows, columns = side, side
        else:
            rows, columns = image_size[0] // size, image_size[1] // size
        if rows * columns != count:
            raise UserError(
                f"{count} patches of {size} pixels do not fill an image of {image_size} pixels"
            )
        pixels = patches.reshape(-1, rows, columns, size, size, channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * size, columns * size)

    def _to_own_grid(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.num_patches:
            return x
        side = _square_side(x.shape[1], "the number of tokens")
        grid = x.transpose(1, 2).unflatten(-1, (side, side))
        return resize_bilinear(grid, self.grid).flatten(2).transpose(1, 2)


def _square_side(count: int, what: str) -> int:
    side = math.isqrt(count)
    if side * side != count or count < 1:
        raise UserError(f"decoder: {what} must be a square number, got {count}")
    return side
