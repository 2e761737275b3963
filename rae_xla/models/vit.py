"""Pre-norm vision-transformer blocks whose parameters are named as in published checkpoints.

There are three families: ViT-MAE (which the decoder uses too), DINOv2 and SigLIP. They compute the
same, but their checkpoints name the parameters differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.ops.attention import attention
from rae_xla.ops.normalization import LayerNorm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class ViTBlockConfig:
    """Sizes and options of one transformer block.

    Attributes:
        width: channels of the tokens.
        num_heads: attention heads.
        mlp_width: hidden channels of the MLP.
        norm_eps: epsilon of the layer norms.
        qkv_bias: whether the query, key and value projections have a bias.
        activation: activation of the MLP, a key of ``ACTIVATIONS``.
        dropout: dropout probability after attention and MLP.
        attention_dropout: dropout probability of the attention weights.

    Raises:
        UserError: if ``num_heads`` does not divide ``width``, or the activation is unknown.
    """

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
                f"a transformer width of {self.width} is not divisible by {self.num_heads} "
                "attention heads; choose a number of heads that divides it"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"unknown hidden_act {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}"
            )


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, dropout: float = 0.0
) -> Tensor:
    """Compute multi-head softmax attention of projections (B, N, width)."""

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    out = attention(split_heads(query), split_heads(key), split_heads(value), dropout)
    return out.transpose(1, 2).flatten(2)


class _Dense(nn.Module):
    """A linear layer whose parameters are named ``dense.*`` in checkpoints."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class _QueryKeyValue(nn.Module):
    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, config.width, bias=config.qkv_bias)


class ViTAttention(nn.Module):
    """Self-attention with separate query, key and value layers (ViT-MAE and DINOv2 names)."""

    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = _QueryKeyValue(config)
        self.output = _Dense(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of (B, N, width)."""
        projections = self.attention
        dropout = self.config.attention_dropout if self.training else 0.0
        query, key, value = projections.query(x), projections.key(x), projections.value(x)
        return self.output(multi_head_attention(query, key, value, self.config.num_heads, dropout))


class ViTMAELayer(nn.Module):
    """Block of ViT-MAE (He et al. 2022): pre-norm attention, then a two-layer MLP."""

    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.attention = ViTAttention(config)
        self.intermediate = _Dense(config.width, config.mlp_width)
        self.output = _Dense(config.mlp_width, config.width)
        self.layernorm_before = LayerNorm(config.width, eps=config.norm_eps)
        self.layernorm_after = LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

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

    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., width)."""
        return self.fc2(self.activation(self.fc1(x)))


class DINOv2SwiGLU(nn.Module):
    """SwiGLU MLP of DINOv2 giant; its width is 2/3 of the MLP's, rounded up to a multiple of 8."""

    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        hidden = (int(config.mlp_width * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(config.width, 2 * hidden)
        self.weights_out = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., width)."""
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * value)


class DINOv2Layer(nn.Module):
    """Block of DINOv2 (Oquab et al. 2023): pre-norm, with a learned scale per channel."""

    def __init__(self, config: ViTBlockConfig, *, use_swiglu: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=config.norm_eps)
        self.attention = ViTAttention(config)
        self.layer_scale1 = _LayerScale(config.width)
        self.norm2 = LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = DINOv2SwiGLU(config) if use_swiglu else ViTMlp(config)
        self.layer_scale2 = _LayerScale(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, width)."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class _SigLIPAttention(nn.Module):
    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(multi_head_attention(query, key, value, self.num_heads))


class SigLIPLayer(nn.Module):
    """Block of the SigLIP vision tower (Zhai et al. 2023)."""

    def __init__(self, config: ViTBlockConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = _SigLIPAttention(config)
        self.layer_norm2 = LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = ViTMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))
