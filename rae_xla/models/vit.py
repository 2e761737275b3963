"""Pre-norm vision-transformer blocks, parameters named as in the published checkpoints.

Three families: ViT-MAE (also the decoder), DINOv2 and SigLIP. The arithmetic is the same, the names
are not, and names are what a checkpoint is read by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.attention import attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class ViTShape:
    """Sizes and options of one transformer block."""

    width: int
    num_heads: int
    mlp_width: int
    norm_eps: float = 1e-12
    qkv_bias: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(
                f"a transformer width of {self.width} cannot be split over {self.num_heads} "
                "attention heads; choose a number of heads that divides it"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"unknown hidden_act {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}"
            )


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, dropout: float = 0.0
) -> Tensor:
    """Multi-head softmax attention over (B, N, width) projections."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    mixed = attention(heads(query), heads(key), heads(value), dropout)
    return mixed.transpose(1, 2).flatten(2)


class _Dense(nn.Module):
    """A linear layer that checkpoints call ``dense``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class _QueryKeyValue(nn.Module):
    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.query = nn.Linear(shape.width, shape.width, bias=shape.qkv_bias)
        self.key = nn.Linear(shape.width, shape.width, bias=shape.qkv_bias)
        self.value = nn.Linear(shape.width, shape.width, bias=shape.qkv_bias)


class ViTAttention(nn.Module):
    """Self-attention with separate query, key and value maps (ViT-MAE and DINOv2 names)."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention = _QueryKeyValue(shape)
        self.output = _Dense(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of (B, N, width)."""
        maps = self.attention
        dropout = self.shape.attention_dropout if self.training else 0.0
        mixed = attend(maps.query(x), maps.key(x), maps.value(x), self.shape.num_heads, dropout)
        return self.output(mixed)


class ViTMAELayer(nn.Module):
    """One block of ViT-MAE (He et al. 2022): pre-norm attention, then a two-layer MLP."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.attention = ViTAttention(shape)
        self.intermediate = _Dense(shape.width, shape.mlp_width)
        self.output = _Dense(shape.mlp_width, shape.width)
        self.layernorm_before = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.layernorm_after = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, width)."""
        x = x + self.dropout(self.attention(self.layernorm_before(x)))
        hidden = self.activation(self.intermediate(self.layernorm_after(x)))
        return x + self.dropout(self.output(hidden))


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class ViTMlp(nn.Module):
    """Two-layer MLP (DINOv2 and SigLIP names)."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., width)."""
        return self.fc2(self.activation(self.fc1(x)))


class DINOv2SwiGLU(nn.Module):
    """Gated MLP of the giant DINOv2: two thirds of the MLP width, rounded up to 8."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        hidden = (int(shape.mlp_width * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(shape.width, 2 * hidden)
        self.weights_out = nn.Linear(hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., width)."""
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * value)


class DINOv2Layer(nn.Module):
    """One block of DINOv2 (Oquab et al. 2023): pre-norm, each branch scaled per channel."""

    def __init__(self, shape: ViTShape, *, use_swiglu: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.attention = ViTAttention(shape)
        self.layer_scale1 = _LayerScale(shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = DINOv2SwiGLU(shape) if use_swiglu else ViTMlp(shape)
        self.layer_scale2 = _LayerScale(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, width)."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class _SigLIPAttention(nn.Module):
    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.k_proj = nn.Linear(shape.width, shape.width)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads)
        return self.out_proj(mixed)


class SigLIPLayer(nn.Module):
    """One block of the SigLIP vision tower (Zhai et al. 2023)."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = _SigLIPAttention(shape)
        self.layer_norm2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = ViTMlp(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))
