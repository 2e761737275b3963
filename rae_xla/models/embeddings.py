"""How images, times, labels and positions become vectors of a diffusion transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a square map, each projected to one token, row by row."""

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
        """Xavier-uniform weight as that of a linear layer, zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, input_size, input_size) -> (B, grid_size², dim).

        Raises:
            UserError: if ``x`` has another shape.
        """
        if x.shape[1:] != self.input_shape:
            raise UserError(
                f"the model was built for latents of shape {self.input_shape} (channels, height, "
                f"width) and got {tuple(x.shape[1:])}; check in_channels and input_size"
            )
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Time in [0, 1] -> vector, by 256 fixed random Fourier features and a two-layer MLP.

    Gaussian Fourier features: Song et al. 2021, "Score-based generative modeling through SDEs".
    The frequencies ``W`` are a parameter that is never trained, as published.
    """

    def __init__(self, dim: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(num_frequencies), requires_grad=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Frequencies N(0, 1), MLP weights N(0, 0.02); the MLP's biases are left alone."""
        nn.init.normal_(self.W)
        normal_mlp_weights(self.mlp)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        angle = (2 * math.pi) * t.float()[:, None] * self.W.float()
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.mlp(features.to(self.W.dtype))


class SinusoidalTimestepEmbedder(nn.Module):
    """Time -> vector by 256 sinusoids of geometric frequencies and a two-layer MLP (DiT)."""

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MLP weights N(0, 0.02); its biases are left alone."""
        normal_mlp_weights(self.mlp)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        half = self.num_features // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        # 10000: the longest period, from "Attention is all you need".
        angle = t.float()[:, None] * torch.exp(index * (-math.log(10000.0) / half))
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


def normal_mlp_weights(mlp: nn.Sequential) -> None:
    """Draw the weights of a Sequential's linears from N(0, 0.02), as DiT does."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)


class LabelEmbedder(nn.Module):
    """Class label -> vector, with one more row, the null label, for classifier-free guidance.

    The null label is ``num_classes``; its row exists only if ``dropout_prob`` > 0.
    """

    def __init__(self, num_classes: int, dim: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def drop(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Replace labels by the null label.

        Rows where ``label_drop`` (B,) bool is true are replaced; when it is None, each row is with
        probability ``dropout_prob``, in train mode only, drawn from torch's generator.
        """
        if label_drop is None:
            if not self.training or self.dropout_prob == 0:
                return y
            label_drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
        return y.masked_fill(label_drop, self.num_classes)

    def forward(self, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """y (B,) int64 -> (B, dim).

        Raises:
            UserError: if a label has no row (on CPU; an accelerator does not look, so that it
                need not wait).
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
    """Sine-cosine position table of a square grid (MAE), one row per token, row by row.

    The first half of the channels encodes the column, the second half the row; each half is all
    sines, then all cosines. ``cls_token`` puts a row of zeros in front.

    Returns:
        (grid_size² [+ 1], dim) float32, on torch's default device.

    Raises:
        UserError: if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(
            f"sine-cosine positions need a width that is a multiple of 4, not {dim}; "
            "choose another hidden_size"
        )
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), omega)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    shape = (grid_size, grid_size, dim // 2)
    table = torch.cat([axis[None].expand(shape), axis[:, None].expand(shape)], dim=-1)
    table = table.flatten(0, 1).float()
    return torch.cat([table.new_zeros(1, dim), table]) if cls_token else table
