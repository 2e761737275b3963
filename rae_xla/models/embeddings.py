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


def unpatchify(tokens: Tensor, grid_size: int, patch_size: int) -> Tensor:
    """Arrange tokens (B, grid_size², p·p·C) as maps (B, C, H, W), the inverse of patching.

    The values of a patch of side p are ordered by row, column, channel.
    """
    patches = tokens.reshape(tokens.shape[0], grid_size, grid_size, patch_size, patch_size, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimestepEmbedder(nn.Module):
    """Embed times in [0, 1] by fixed random Fourier features and a two-layer MLP.

    Gaussian Fourier features: Song et al. 2021, "Score-based generative modeling through SDEs".
    The frequencies ``W`` are a parameter that is not trained, as published by RAE; with tokens it
    is trained, as published by RAEv2.

    Args:
        dim: channels of the embedding.
        num_frequencies: number of frequencies, each of which gives a sine and a cosine.
        num_tokens: number of context tokens that ``tokens`` returns.
    """

    learnable_tokens: nn.Parameter

    def __init__(self, dim: int, num_frequencies: int = 256, num_tokens: int = 0) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.W = nn.Parameter(torch.empty(num_frequencies), requires_grad=num_tokens > 0)
        if num_tokens:
            self.learnable_tokens = nn.Parameter(torch.empty(num_tokens, dim))
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw frequencies from N(0, 1) and MLP weights from N(0, 0.02²); keep the biases."""
        nn.init.normal_(self.W)
        normal_mlp_weights(self.mlp)
        if self.num_tokens:
            normal_tokens(self.learnable_tokens)

    def tokens(self, embedding: Tensor) -> Tensor:
        """Return context tokens (B, num_tokens, dim) of times embedded as (B, dim)."""
        return self.learnable_tokens + embedding[:, None]

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


def normal_tokens(tokens: Tensor) -> None:
    """Draw learnable tokens (N, dim) from a normal distribution of variance 1 / dim, as RAEv2."""
    nn.init.normal_(tokens, std=tokens.shape[-1] ** -0.5)


class LabelEmbedder(nn.Module):
    """Embed class labels, including a null label for classifier-free guidance.

    Args:
        num_classes: number of classes; the null label is ``num_classes``.
        dim: channels of the embedding.
        dropout_prob: probability of replacing a label by the null label in training. With 0 the
            table has no row for the null label, unless there are tokens (as published).
        num_tokens: number of context tokens that ``tokens`` returns.
    """

    learnable_tokens: nn.Parameter

    def __init__(
        self, num_classes: int, dim: int, dropout_prob: float, num_tokens: int = 0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.num_tokens = num_tokens
        if num_tokens:
            self.learnable_tokens = nn.Parameter(torch.empty(num_tokens, dim))
        rows = num_classes + (dropout_prob > 0 or num_tokens > 0)
        self.embedding_table = nn.Embedding(rows, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02²)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)
        if self.num_tokens:
            normal_tokens(self.learnable_tokens)

    def tokens(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Return context tokens (B, num_tokens, dim) of labels; see ``forward``."""
        return self.learnable_tokens + self(y, label_drop)[:, None]

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


def context_sizes(conditioning: str, num_t_tokens: int, num_c_tokens: int) -> tuple[int, int]:
    """Return the numbers of time and label tokens of a model; none with adaLN.

    Raises:
        UserError: the conditioning is unknown, or a number is below 1.
    """
    if conditioning == "adaln":
        return 0, 0
    if conditioning != "tokens":
        raise UserError(f"conditioning: {conditioning!r} is not one of adaln, tokens")
    for name, count in (("num_t_tokens", num_t_tokens), ("num_c_tokens", num_c_tokens)):
        if count < 1:
            raise UserError(f"{name}: conditioning by tokens needs at least 1, got {count}")
    return num_t_tokens, num_c_tokens


def append_tokens(x: Tensor, *context: Tensor) -> Tensor:
    """Append context tokens to the tokens (B, L, D) of a latent, in the context's precision."""
    return torch.cat([x.to(context[0].dtype), *context], dim=1)


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
