"""Embeddings of latent patches, times, class labels and positions in a diffusion transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError


class PatchEmbed(nn.Module):
    """Project the non-overlapping patches of a square map to tokens, in row-major order.

    Args:
        input_size: height and width of the map.
        patch_size: height and width of a patch.
        in_channels: channels of the map.
        dim: channels of a token.

    Raises:
        UserError: if ``patch_size`` does not divide ``input_size``.
    """

    def __init__(self, input_size: int, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        if input_size % patch_size:
            raise UserError(
                f"input_size {input_size} is not divisible by patch_size {patch_size}; "
                "choose a patch size that divides it"
            )
        self.input_shape = (in_channels, input_size, input_size)
        self.grid_size = input_size // patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as a linear layer: Xavier-uniform weight, zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``x`` (B, in_channels, input_size, input_size) as tokens (B, grid_size², dim).

        Raises:
            UserError: if ``x`` has another shape.
        """
        if x.shape[1:] != self.input_shape:
            raise UserError(
                f"the model expects latents of shape {self.input_shape} (channels, height, "
                f"width), got {tuple(x.shape[1:])}; check in_channels and input_size"
            )
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embed times in [0, 1] by fixed random Fourier features and a two-layer MLP.

    Gaussian Fourier features: Song et al. 2021, "Score-based generative modeling through SDEs".
    The frequencies ``W`` are a parameter that is never trained, as published.

    Args:
        dim: channels of the embedding.
        num_frequencies: number of frequencies, each of which gives a sine and a cosine.
    """

    def __init__(self, dim: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(num_frequencies), requires_grad=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw frequencies from N(0, 1) and MLP weights from N(0, 0.02²); keep the biases."""
        nn.init.normal_(self.W)
        normal_mlp_weights(self.mlp)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t`` (B,) as (B, dim)."""
        angle = (2 * math.pi) * t.float()[:, None] * self.W.float()
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.mlp(features.to(self.W.dtype))


class SinusoidalTimestepEmbedder(nn.Module):
    """Embed times by sinusoids of geometric frequencies and a two-layer MLP (DiT).

    Args:
        dim: channels of the embedding.
        num_features: number of cosines and sines in all.
    """

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the MLP weights from N(0, 0.02²); keep the biases."""
        normal_mlp_weights(self.mlp)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t`` (B,) as (B, dim)."""
        half = self.num_features // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        # 10000: the longest period, from "Attention is all you need".
        angle = t.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


def normal_mlp_weights(mlp: nn.Sequential) -> None:
    """Draw the weights of the linear layers in ``mlp`` from N(0, 0.02²), as DiT does."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)


class LabelEmbedder(nn.Module):
    """Embed class labels, including a null label for classifier-free guidance.

    Args:
        num_classes: number of classes; the null label is ``num_classes``.
        dim: channels of the embedding.
        dropout_prob: probability of replacing a label by the null label in training. With 0 the
            table has no row for the null label.
    """

    def __init__(self, num_classes: int, dim: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02²)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def drop(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Replace labels by the null label.

        Args:
            y: labels (B,) int64.
            label_drop: (B,) bool, the rows to replace. If None, each row is replaced with
                probability ``dropout_prob`` in train mode, by PyTorch's global generator, and
                none in eval mode.
        """
        if label_drop is None:
            if not self.training or self.dropout_prob == 0:
                return y
            label_drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
        return y.masked_fill(label_drop, self.num_classes)

    def forward(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Embed labels ``y`` (B,) int64 as (B, dim); see ``drop`` for ``label_drop``.

        Raises:
            UserError: if a label is out of range. Only on CPU: on an accelerator the check would
                have to wait for the device.
        """
        try:
            return self.embedding_table(self.drop(y, label_drop))
        except IndexError as error:
            raise UserError(
                f"a label is outside 0..{self.embedding_table.num_embeddings - 1} "
                f"(num_classes {self.num_classes}, class_dropout_prob {self.dropout_prob:g}); "
                "check the labels against num_classes"
            ) from error


def sincos_positions(dim: int, grid_size: int, *, cls_token: bool = False) -> Tensor:
    """Compute the sine-cosine position table of a square grid (MAE, He et al. 2022).

    The first half of the channels encodes the column, the second half the row; each half has all
    sines, then all cosines.

    Args:
        dim: channels, a multiple of 4.
        grid_size: tokens along each side of the grid.
        cls_token: prepend a row of zeros for a class token.

    Returns:
        (grid_size² [+ 1], dim) float32 in row-major order, on PyTorch's default device.

    Raises:
        UserError: if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(
            f"sine-cosine positions require a width that is a multiple of 4, got {dim}; "
            "choose another hidden_size"
        )
    # 10000: the longest period, as in MAE.
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), omega)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    shape = (grid_size, grid_size, dim // 2)
    table = torch.cat([axis[None].expand(shape), axis[:, None].expand(shape)], dim=-1)
    table = table.flatten(0, 1).float()
    return torch.cat([table.new_zeros(1, dim), table]) if cls_token else table
