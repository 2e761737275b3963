"""DINOv3 vision transformers (Siméoni et al. 2025) in the names of transformers' models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DINOv3ViTConfig

from rae_xla.errors import UserError
from rae_xla.models.encoders.backbone import square_side
from rae_xla.models.encoders.frozen import BackboneEncoder, parse_config, read_encoder_config
from rae_xla.models.encoders.fusion import make_fusion
from rae_xla.models.vit import ACTIVATIONS
from rae_xla.ops.attention import attention
from rae_xla.ops.normalization import LayerNorm

RopeTables = tuple[Tensor, Tensor]


class _Embeddings(nn.Module):
    """Class token, registers and patches; and the rotary tables of the patches.

    The tables are buffers outside the state dict, (num_extra_tokens + N, head_dim). They are
    computed when the module sees another grid and after weights are loaded.

    Attributes:
        grid: (rows, columns) of patches that the tables are for.
        num_extra_tokens: tokens before the patches.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, square_side(config.patch_size, "patch_size")
        self.base, self.head_dim = config.rope_theta, width // config.num_attention_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        self.patch_embeddings = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.num_extra_tokens = 1 + config.num_register_tokens
        self.grid = (0, 0)
        self.register_buffer("cosines", torch.zeros(0), persistent=False)
        self.register_buffer("sines", torch.zeros(0), persistent=False)
        self.register_load_state_dict_post_hook(_resample_after_load)

    @torch.no_grad()
    def resample(self, grid: tuple[int, int]) -> None:
        """Compute the rotary tables of a grid of (rows, columns) patches.

        The centres of the patches have coordinates from -1 to 1 along each axis, whatever their
        number. The channels of a head are rotated in pairs half a head apart; the first half of
        the pairs by the row, the second by the column.
        """
        axes = [(2 * torch.arange(size) + 1) / size - 1 for size in grid]
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        centres = torch.stack([rows.flatten(), columns.flatten()], dim=1)
        frequency = self.base ** -torch.arange(0, 1, 4 / self.head_dim)
        angles = (2 * math.pi * centres[:, :, None] * frequency).flatten(1).tile(2)
        angles = F.pad(angles, (0, 0, self.num_extra_tokens, 0))  # the others are not rotated
        like = self.cls_token
        self.cosines, self.sines = angles.cos().to(like), angles.sin().to(like)
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as tokens (B, num_extra_tokens + N, width)."""
        patches = self.patch_embeddings(images)
        grid = (patches.shape[2], patches.shape[3])
        if grid != self.grid:
            self.resample(grid)
        extra = torch.cat([self.cls_token, self.register_tokens], dim=1)
        tokens = patches.flatten(2).transpose(1, 2)
        return torch.cat([extra.expand(len(images), -1, -1), tokens], dim=1)


def _resample_after_load(module: nn.Module, _: Any) -> None:
    embeddings = cast("_Embeddings", module)
    embeddings.resample(embeddings.grid)


class _Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=config.query_bias)
        self.k_proj = nn.Linear(width, width, bias=config.key_bias)
        self.v_proj = nn.Linear(width, width, bias=config.value_bias)
        self.o_proj = nn.Linear(width, width, bias=config.proj_bias)

    def forward(self, x: Tensor, rope: RopeTables) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (_rotate(part, *rope).to(value.dtype) for part in (query, key))
        return self.o_proj(attention(query, key, value).transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate pairs of channels half a head apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class _Mlp(nn.Module):
    """Two-layer MLP, or a gated one (the larger models)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.use_gated_mlp:
            self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.is_gated = config.use_gated_mlp
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"unknown hidden_act {config.hidden_act!r}; choose one of {', '.join(ACTIVATIONS)}"
            )
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class DINOv3Layer(nn.Module):
    """Block of DINOv3: pre-norm, rotary positions, and a learned scale per channel.

    Args:
        config: the model's configuration, as transformers parses it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = _Attention(config)
        self.layer_scale1 = _LayerScale(width)
        self.norm2 = LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)
        self.layer_scale2 = _LayerScale(width)

    def forward(self, x: Tensor, rope: RopeTables) -> Tensor:
        """Transform (B, N, width); ``rope`` are the cosines and sines of N tokens."""
        x = x + self.layer_scale1(self.attention(self.norm1(x), rope))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DINOv3Backbone(nn.Module):
    """Embeddings, blocks and final norm, named as in DINOv3 checkpoints.

    Args:
        config: the model's configuration, as transformers parses it.
        norm: the final norm.
    """

    def __init__(self, config: Any, norm: nn.Module) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.layer = nn.ModuleList(DINOv3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = norm

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.layer

    @property
    def final_norm(self) -> nn.Module:
        """The norm that follows the last block."""
        return self.norm

    def block_inputs(self) -> tuple[Any, ...]:
        """Return what every block receives besides the tokens."""
        return ((self.embeddings.cosines, self.embeddings.sines),)


class DINOv3Encoder(BackboneEncoder):
    """DINOv3 ViT-S to ViT-7B, as RAEv2 uses them.

    Args:
        model_name: local model folder or hub id; or, on the meta device, the configuration.
        normalize: omit the affine map of the final norm, as RAEv2 does.
        input_size: side of the expected images in pixels, for which positions are computed.
        layers: blocks, counted from 0, whose normalised outputs are combined; None for the last
            one alone.
        fusion: ``mean`` or ``sum`` of the layers.
        token_mean: add the mean over all tokens of the last layer to every token.

    Raises:
        UserError: if the folder is missing, contains another type of model, or its weights do not
            match.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any],
        normalize: bool = True,
        input_size: int | None = None,
        layers: Sequence[int] | None = None,
        fusion: str = "mean",
        token_mean: bool = False,
    ) -> None:
        values = read_encoder_config(model_name, ("dinov3_vit",))
        config = parse_config(DINOv3ViTConfig, values, model_name)
        norm = LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=not normalize
        )
        super().__init__(
            "model", DINOv3Backbone(config, norm), config, make_fusion(layers, fusion, token_mean)
        )
        self._prepare(model_name, input_size, "embeddings.cls_token", config.image_size)
