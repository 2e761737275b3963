"""WebSSL-DINO: DINOv2 without registers, trained on web images (Fan et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Dinov2Config

from rae_xla.models.encoders.backbone import TokenEmbeddings, ViTBackbone, square_side
from rae_xla.models.encoders.frozen import (
    BackboneEncoder,
    dinov2_blocks,
    parse_config,
    read_encoder_config,
)
from rae_xla.ops.normalization import LayerNorm
from rae_xla.ops.resize import resize_bilinear


class _Embeddings(TokenEmbeddings):
    """Embeddings of DINOv2 without registers: a class token, then the patches."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, num_registers=0)
        del self.register_tokens
        self.antialias = False  # transformers resamples the positions of this model without it


class WebSSLEncoder(BackboneEncoder):
    """DINOv2 without registers, with the affine map of its final norm, as Scale-RAE reads it.

    Args:
        model_name: local model folder or hub id, such as ``facebook/webssl-dino300m-full2b-224``;
            or, on the meta device, the configuration.
        num_tokens: resize the tokens bilinearly to this number; by default they are not resized.
        input_size: side of the expected images in pixels, for which positions are resampled.

    Raises:
        UserError: the folder is missing, contains another type of model, or its weights do not
            match.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any],
        num_tokens: int | None = None,
        input_size: int | None = None,
    ) -> None:
        config = parse_config(
            Dinov2Config, read_encoder_config(model_name, ("dinov2",)), model_name
        )
        block, layers = dinov2_blocks(config)
        norm = LayerNorm(block.width, eps=block.norm_eps)
        super().__init__("encoder", ViTBackbone(_Embeddings(config), layers, norm), config)
        self.side = (
            None if num_tokens is None else square_side(round(num_tokens**0.5), "num_tokens")
        )
        self._prepare(model_name, input_size, "embeddings.cls_token", config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to patch tokens (B, N, hidden_size), row by row."""
        tokens = super().forward(images)
        side = round(tokens.shape[1] ** 0.5)
        if self.side in (None, side):
            return tokens
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return resize_bilinear(grid, self.side).flatten(2).transpose(1, 2)
