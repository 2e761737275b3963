"""Encoder trunks: embeddings with resampled positions, blocks and a final norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.vit import ViTMlp, ViTShape


class PositionedPatches(nn.Module):
    """Patch embedding plus a position table that is resampled to the input's grid.

    The resampled table is a plain tensor kept beside the parameters, out of the state dict. It is
    made anew when another grid comes or weights are loaded.
    """

    resampled: Tensor
    num_extra_tokens: int  # before the patches: class token, registers

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias
        self.grid = (0, 0)
        self.register_buffer("resampled", torch.zeros(0), persistent=False)
        self.register_load_state_dict_post_hook(_resample_again)

    def patch_positions(self) -> Tensor:
        """Return the stored table of the patches, (1, side², width)."""
        raise NotImplementedError

    @torch.no_grad()
    def resample(self, grid: tuple[int, int]) -> None:
        """Make the table of a grid of (rows, columns) patches, on the host, as transformers does.

        transformers resamples bicubically, with antialiasing for DINOv2 only.
        """
        table = self.patch_positions()
        side = round(table.shape[1] ** 0.5)
        resampled = table
        if grid != (side, side):
            host = table if table.is_meta else table.cpu()
            image = host.float().transpose(1, 2).unflatten(2, (side, side))
            image = F.interpolate(image, size=grid, mode="bicubic", antialias=self.antialias)
            resampled = image.flatten(2).transpose(1, 2).to(table)
        self.resampled = resampled.detach().clone()
        self.grid = grid

    def add_positions(self, patches: Tensor) -> Tensor:
        """Turn a patch map (B, width, rows, columns) into tokens with their positions added."""
        grid = (patches.shape[2], patches.shape[3])
        if grid != self.grid:
            self.resample(grid)
        return patches.flatten(2).transpose(1, 2) + self.resampled


def _resample_again(module: nn.Module, _: Any) -> None:
    embeddings = cast("PositionedPatches", module)
    embeddings.resample(embeddings.grid)


class TokenEmbeddings(PositionedPatches):
    """Embeddings of DINOv2 and MAE: a class token, registers if any, then the patches."""

    def __init__(self, config: Any, registers: int | None) -> None:
        super().__init__(antialias=registers is not None)
        width, patch = config.hidden_size, square_side(config.patch_size, "patch_size")
        side = square_side(config.image_size, "image_size") // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if registers is not None:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(config.num_channels, width, patch, stride=patch)}
        )
        self.num_extra_tokens = 1 + (registers or 0)

    def patch_positions(self) -> Tensor:
        """Return the stored table of the patches, (1, side², width)."""
        return self.position_embeddings[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as (B, extra tokens + N, width)."""
        patches = self.add_positions(self.patch_embeddings["projection"](images))
        extra = [self.cls_token + self.position_embeddings[:, :1]]
        if self.num_extra_tokens > 1:
            extra.append(self.register_tokens)
        batch = images.shape[0]
        return torch.cat([*(token.expand(batch, -1, -1) for token in extra), patches], dim=1)


class PatchEmbeddings(PositionedPatches):
    """Embeddings of SigLIP: the patches alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(antialias=False)
        self.num_extra_tokens = 0
        width, patch = config.hidden_size, square_side(config.patch_size, "patch_size")
        side = square_side(config.image_size, "image_size") // patch
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(side * side, width)

    def patch_positions(self) -> Tensor:
        """Return the stored table of the patches, (1, side², width)."""
        return self.position_embedding.weight[None]

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as (B, N, width)."""
        return self.add_positions(self.patch_embedding(images))


class SigLIPHead(nn.Module):
    """SigLIP's attention pooling. Never run: it is here because it is in the state dict."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.attention = nn.MultiheadAttention(shape.width, shape.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = ViTMlp(shape)


class ViTTrunk(nn.Module):
    """Embeddings, blocks and final norm under the names of DINOv2 and MAE checkpoints."""

    def __init__(self, embeddings: PositionedPatches, layers: Iterable[nn.Module], norm: nn.Module):
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = norm

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) into all tokens, (B, extra tokens + N, width)."""
        return self.layernorm(_through(self.encoder["layer"], self.embeddings(images)))


class SigLIPTrunk(nn.Module):
    """Embeddings, blocks, final norm and head under the names of SigLIP checkpoints."""

    def __init__(
        self,
        embeddings: PositionedPatches,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = norm
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) into tokens (B, N, width)."""
        return self.post_layernorm(_through(self.encoder["layers"], self.embeddings(images)))


def square_side(value: int | Iterable[int], what: str) -> int:
    """Return the one side of a size given as a number or as equal numbers.

    Raises:
        UserError: if the sides differ.
    """
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise UserError(f"encoder configuration: {what} must be square, got {value}")
    return sides.pop()


def _through(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x)
    return x
