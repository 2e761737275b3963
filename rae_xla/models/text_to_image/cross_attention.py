"""A head whose blocks attend to the tokens of a context (PixArt-alpha, Chen et al. 2023).

Adaptive norms give the blocks the time alone. The cross-attention of a new model adds nothing, so
training starts from an unconditional model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.models.embeddings import PatchEmbed, TimestepEmbedder, sincos_positions
from rae_xla.models.intermediate_heads import DenoiserOutputs, check_depth, mark_read_blocks
from rae_xla.models.layers import (
    DiTBlock,
    FinalLayer,
    FusedLinear,
    channels_per_head,
    init_weights,
    modulate,
    xavier_linear,
    zero,
)
from rae_xla.models.text_to_image.context import ContextEmbedder, context_bias
from rae_xla.models.weights import constructor_arguments
from rae_xla.ops.attention import attention
from rae_xla.ops.normalization import RMSNorm
from rae_xla.ops.rotary import RopeTables, RotaryEmbedding


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to those of a context, with normalised queries and keys.

    Args:
        dim: channels of the tokens, and of those of the context.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = channels_per_head(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = FusedLinear(dim, dim, 2)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Set the output projection to zero."""
        zero(self.proj)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """Return what tokens (B, L, dim) read from a context (B, T, dim)."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context, heads=self.num_heads)
        # Under autocast a float32 norm weight promotes q and k; attention requires one dtype.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(attention(q, k, v, bias=bias).transpose(1, 2).flatten(2))


class CrossAttentionBlock(DiTBlock):
    """``DiTBlock`` with cross-attention between self-attention and feed-forward layer.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, use_qknorm=True)
        self.cross_norm = RMSNorm(dim)
        self.cross = CrossAttention(dim, num_heads)

    def forward(  # type: ignore[override]
        self, x: Tensor, c: Tensor, rope: RopeTables, context: Tensor, bias: Tensor
    ) -> Tensor:
        """Transform tokens (B, L, dim).

        Args:
            x: tokens.
            c: embedded times (B, 1, dim).
            rope: rotary tables for L tokens.
            context: tokens (B, T, dim) to attend to.
            bias: of the scores of that attention.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        x = x + self.cross(self.cross_norm(x), context, bias)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class CrossAttentionDiT(nn.Module):
    """Diffusion transformer that attends to a context (``context.pack_context``) in every block.

    Args:
        input_size: height and width of the latents.
        in_channels: channels of the latents.
        context_dim: channels of a condition vector.
        hidden_size: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        base_model_depth: number of the block, from 1, that the base head reads; None for no base
            head.

    Raises:
        UserError: the sizes are incompatible.
    """

    def __init__(
        self,
        input_size: int = 16,
        in_channels: int = 1024,
        context_dim: int = 1024,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        base_model_depth: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = constructor_arguments(locals())
        self.input_size = input_size
        check_depth("base_model_depth", base_model_depth, depth)
        self.base_model_depth = base_model_depth
        self.x_embedder = PatchEmbed(input_size, 1, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = ContextEmbedder(context_dim, hidden_size)
        table = sincos_positions(hidden_size, input_size)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.feat_rope = RotaryEmbedding(channels_per_head(hidden_size, num_heads), input_size)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(hidden_size, num_heads) for _ in range(depth)
        )
        mark_read_blocks(list(self.blocks), base_model_depth)
        self.final_layer = FinalLayer(hidden_size, in_channels, use_rmsnorm=True)
        self.base_final_layer: FinalLayer | None = None
        if base_model_depth is not None:
            self.base_final_layer = FinalLayer(hidden_size, in_channels, use_rmsnorm=True)
        self.init_weights()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the position table."""
        self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[-1], self.input_size))

    def init_weights(self) -> None:
        """Initialise all parameters and tables, as after ``to_empty``."""
        init_weights(self, linear=xavier_linear)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, all_outputs: bool = False
    ) -> Tensor | DenoiserOutputs:
        """Predict the velocity of noisy latents, or what else the model was trained to predict.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is noise.
            y: contexts (B, T, context_dim + 1).
            all_outputs: also return the output of the base head.

        Returns:
            (B, C, H, W), or with ``all_outputs`` both predictions.
        """
        c = self.t_embedder(t)[:, None]
        h = self.x_embedder(x) + self.pos_embed
        # A first token of zeros, so that there is something to attend to if the prompt is empty.
        context = F.pad(self.y_embedder(y), (0, 0, 1, 0))
        inputs = (c, self.feat_rope(), context, context_bias(y, others=1))
        base: Tensor | None = None
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, *inputs)
            if depth == self.base_model_depth:
                base = h
        full = self._to_latents(self.final_layer(h, c))
        if not all_outputs:
            return full
        if self.base_final_layer is not None and base is not None:
            base = self._to_latents(self.base_final_layer(base, c))
        return DenoiserOutputs(full, base)

    def _to_latents(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (self.input_size, self.input_size))
