"""Vision-transformer backbones of the encoders: embeddings, blocks and a final norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.vit import ViTBlockConfig, ViTMlp
from rae_xla.ops.normalization import LayerNorm


class ResampledPositionEmbeddings(nn.Module):
    """Base of patch embeddings whose position table is resampled to the grid of the input.

    The resampled table is a buffer outside the state dict. It is computed when the module sees
    another grid and after weights are loaded, not in each forward pass.

    Attributes:
        resampled: the resampled table (1, rows * columns, width).
        grid: (rows, columns) of patches that ``resampled`` is for.
        num_extra_tokens: tokens before the patches, such as a class token and registers.
    """

    resampled: Tensor
    num_extra_tokens: int

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias
        self.grid = (0, 0)
        self.register_buffer("resampled", torch.zeros(0), persistent=False)
        self.register_load_state_dict_post_hook(_resample_after_load)

    def patch_positions(self) -> Tensor:
        """Return the stored position table of the patches, (1, side², width)."""
        raise NotImplementedError

    @torch.no_grad()
    def resample(self, grid: tuple[int, int]) -> None:
        """Compute the table of a grid of (rows, columns) patches on the CPU, as transformers does.

        transformers resamples bicubically, with antialiasing for DINOv2 only.
        """
        table = self.patch_positions()
        side = round(table.shape[1] ** 0.5)
        resampled = table
        if grid != (side, side):
            on_cpu = table if table.is_meta else table.cpu()
            image = on_cpu.float().transpose(1, 2).unflatten(2, (side, side))
            image = F.interpolate(image, size=grid, mode="bicubic", antialias=self.antialias)
            resampled = image.flatten(2).transpose(1, 2).to(table)
        self.resampled = resampled.detach().clone()
        self.grid = grid

    def add_positions(self, patches: Tensor) -> Tensor:
        """Flatten patches (B, width, rows, columns) to tokens and add their positions."""
        grid = (patches.shape[2], patches.shape[3])
        if grid != self.grid:
            self.resample(grid)
        return patches.flatten(2).transpose(1, 2) + self.resampled


def _resample_after_load(module: nn.Module, _: Any) -> None:
    embeddings = cast("ResampledPositionEmbeddings", module)
    embeddings.resample(embeddings.grid)


class TokenEmbeddings(ResampledPositionEmbeddings):
    """Embeddings of DINOv2 and MAE: a class token, optional registers, then the patches.

    Args:
        config: the model's configuration, as transformers parses it.
        num_registers: number of register tokens (DINOv2), or None for a model without (MAE).
    """

    def __init__(self, config: Any, num_registers: int | None) -> None:
        super().__init__(antialias=num_registers is not None)
        width, patch = config.hidden_size, square_side(config.patch_size, "patch_size")
        side = square_side(config.image_size, "image_size") // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if num_registers is not None:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(config.num_channels, width, patch, stride=patch)}
        )
        self.num_extra_tokens = 1 + (num_registers or 0)

    def patch_positions(self) -> Tensor:
        """Return the stored position table of the patches, (1, side², width)."""
        return self.position_embeddings[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as tokens (B, num_extra_tokens + N, width)."""
        patches = self.add_positions(self.patch_embeddings["projection"](images))
        extra = [self.cls_token + self.position_embeddings[:, :1]]
        if self.num_extra_tokens > 1:
            extra.append(self.register_tokens)
        batch = images.shape[0]
        return torch.cat([*(token.expand(batch, -1, -1) for token in extra), patches], dim=1)


class PatchEmbeddings(ResampledPositionEmbeddings):
    """Embeddings of SigLIP: patches only.

    Args:
        config: the vision model's configuration, as transformers parses it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(antialias=False)
        self.num_extra_tokens = 0
        width, patch = config.hidden_size, square_side(config.patch_size, "patch_size")
        side = square_side(config.image_size, "image_size") // patch
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(side * side, width)

    def patch_positions(self) -> Tensor:
        """Return the stored position table of the patches, (1, side², width)."""
        return self.position_embedding.weight[None]

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as tokens (B, N, width)."""
        return self.add_positions(self.patch_embedding(images))


class SigLIPHead(nn.Module):
    """Attention pooling of SigLIP, which the encoder does not use.

    It exists because published state dicts contain its parameters.
    """

    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.width))
        self.attention = nn.MultiheadAttention(config.width, config.num_heads, batch_first=True)
        self.layernorm = LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = ViTMlp(config)


class ViTBackbone(nn.Module):
    """Embeddings, blocks and final norm, named as in DINOv2 and MAE checkpoints."""

    def __init__(
        self, embeddings: ResampledPositionEmbeddings, layers: Iterable[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = norm

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return cast("nn.ModuleList", self.encoder["layer"])

    @property
    def final_norm(self) -> nn.Module:
        """The norm that follows the last block."""
        return self.layernorm

    def block_inputs(self) -> tuple[Tensor, ...]:
        """Return what every block receives besides the tokens: nothing."""
        return ()

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to all tokens (B, num_extra_tokens + N, width)."""
        return self.layernorm(_apply_layers(self.encoder["layer"], self.embeddings(images)))


class SigLIPBackbone(nn.Module):
    """Embeddings, blocks, final norm and unused head, named as in SigLIP checkpoints."""

    def __init__(
        self,
        embeddings: ResampledPositionEmbeddings,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = norm
        self.head = head

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return cast("nn.ModuleList", self.encoder["layers"])

    @property
    def final_norm(self) -> nn.Module:
        """The norm that follows the last block."""
        return self.post_layernorm

    def block_inputs(self) -> tuple[Tensor, ...]:
        """Return what every block receives besides the tokens: nothing."""
        return ()

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to tokens (B, N, width)."""
        return self.post_layernorm(_apply_layers(self.encoder["layers"], self.embeddings(images)))


class Backbone(Protocol):
    """What an encoder requires of its vision transformer, a module."""

    embeddings: Any
    """Maps images to tokens; has ``num_extra_tokens``, ``grid`` and ``resample``."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        ...

    @property
    def final_norm(self) -> nn.Module:
        """The norm that follows the last block."""
        ...

    def block_inputs(self) -> tuple[Any, ...]:
        """Return what every block receives besides the tokens."""
        ...


def square_side(value: int | Iterable[int], key: str) -> int:
    """Return the side of a square that is configured as one number or as (height, width).

    Args:
        value: the configured size.
        key: its configuration key, for the error message.

    Raises:
        UserError: if height and width differ.
    """
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise UserError(f"encoder configuration: {key} must be square, got {value}")
    return sides.pop()


def _apply_layers(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x)
    return x
