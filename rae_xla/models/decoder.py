"""Decoder of the RAE: a vision transformer from tokens to image patches (RAE, section 3)."""

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
from rae_xla.models.vit import ViTBlockConfig, ViTMAELayer
from rae_xla.ops.normalization import LayerNorm
from rae_xla.ops.resize import resize_bilinear


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's keys of a Hugging Face ``vit_mae`` configuration, with the same defaults.

    ``hidden_size`` is the number of channels of the latent tokens, ``patch_size`` the side of a
    decoded patch in pixels.

    Raises:
        UserError: if a size is not a positive integer.
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
                    f"decoder configuration: {field.name} must be a positive integer, got {value!r}"
                )

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], **changes: Any) -> DecoderConfig:
        """Read a decoder configuration; keys of other parts of the model are ignored.

        Args:
            source: a ``config.json``, the folder that contains it, or a mapping.
            **changes: values that replace those of ``source``.

        Raises:
            UserError: if the file is missing or not JSON, or a value is invalid.
        """
        values = source if isinstance(source, Mapping) else _read_json(Path(source))
        known = {field.name for field in fields(cls)}
        return cls(**{**{k: v for k, v in values.items() if k in known}, **changes})

    @property
    def block(self) -> ViTBlockConfig:
        """Sizes and options of one decoder block."""
        return ViTBlockConfig(
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
            f"decoder_config_path: {file} does not exist; give a folder that contains the "
            "config.json of a vit_mae model"
        )
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"decoder_config_path: {file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"decoder_config_path: {file} must contain a JSON object")
    return values


class ViTDecoder(nn.Module):
    """Vision-transformer decoder, published as ``GeneralDecoder``; state-dict keys as published.

    ``decoder_pos_embed`` (1, 1 + num_patches, width) is a parameter that is not trained by default.

    Args:
        config: a ``DecoderConfig``, a ``config.json``, the folder that contains it, or a mapping.
        num_patches: number of tokens in the decoder's square grid.
        **changes: values that replace those of ``config`` (``hidden_size``, ``patch_size``, ...).

    Raises:
        UserError: if ``num_patches`` is not a square, or the configuration is invalid.
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
        self.decoder_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(self, tokens: Tensor, drop_cls_token: bool = False) -> Tensor:
        """Decode tokens to patches.

        Args:
            tokens: (B, N, hidden_size). If N differs from ``num_patches`` it must be a square: the
                embedded tokens are then resized bilinearly to the decoder's grid.
            drop_cls_token: ignore the first token.

        Returns:
            (B, num_patches, patch_size² · channels).

        Raises:
            UserError: if the tokens have another width, or N is not a square.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.hidden_size:
            raise UserError(
                f"the decoder expects tokens of shape (batch, N, {self.config.hidden_size}), "
                f"got {tuple(tokens.shape)}"
            )
        x = self.decoder_embed(tokens[:, 1:] if drop_cls_token else tokens)
        x = self._resize_to_grid(x)
        x = torch.cat([self.trainable_cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def unpatchify(self, patches: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Arrange patches (B, N, patch_size² · channels) as images (B, channels, H, W).

        Args:
            patches: patches in row-major order; the values of each are ordered by row, column,
                channel.
            image_size: (H, W) in pixels; by default the patches form a square.

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

    def _resize_to_grid(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.num_patches:
            return x
        side = _square_side(x.shape[1], "the number of tokens")
        grid = x.transpose(1, 2).unflatten(-1, (side, side))
        return resize_bilinear(grid, self.grid).flatten(2).transpose(1, 2)


def _square_side(count: int, name: str) -> int:
    """Return the square root of ``count``; ``name`` describes it in the error."""
    side = math.isqrt(count)
    if side * side != count or count < 1:
        raise UserError(f"decoder: {name} must be a square number, got {count}")
    return side
