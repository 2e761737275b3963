"""The image head of Scale-RAE: a diffusion transformer with one condition vector per token.

Section 2 of the semantics: every latent token is conditioned on the language model's hidden state
at the query of the same index, through adaptive norms (adaLN). There is no cross-attention and no
pooled vector. The state-dict keys are those of ``diff_head.model`` in the published checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.errors import UserError
from rae_xla.models.embeddings import PatchEmbed, normal_mlp_weights, sincos_positions
from rae_xla.models.layers import (
    DiTBlock,
    FinalLayer,
    FusedLinear,
    channels_per_head,
    init_weights,
    xavier_linear,
)
from rae_xla.models.weights import constructor_arguments
from rae_xla.ops.rotary import RotaryEmbedding

# The frequencies are not in the published checkpoints: the reference draws them from a CPU
# generator with this seed whenever it builds a model.
_FREQUENCY_SEED = 114514


class FixedTimestepEmbedder(nn.Module):
    """Embed times in [0, 1] by constant random Fourier features and a two-layer MLP.

    Args:
        dim: channels of the embedding.
        num_frequencies: number of frequencies, each of which gives a sine and a cosine.
    """

    def __init__(self, dim: int, num_frequencies: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_FREQUENCY_SEED)
        # Outside the state dict, so it must have its values even on the meta device.
        frequencies = torch.randn(num_frequencies, generator=generator, device="cpu")
        self.W: Tensor
        self.register_buffer("W", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def reset_parameters(self) -> None:
        """Draw the MLP weights from N(0, 0.02²); keep the biases."""
        normal_mlp_weights(self.mlp)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t`` (B,) as (B, dim)."""
        angle = (2 * math.pi) * t.float()[:, None] * self.W.float()
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class NullCondition(nn.Module):
    """The learned vector that replaces the condition of every token of an image.

    Args:
        dim: channels of a condition vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dropout_embedding = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Set the vector to zero."""
        nn.init.zeros_(self.dropout_embedding)

    def forward(self, condition: Tensor, drop: Tensor) -> Tensor:
        """Replace the rows of ``condition`` (B, P, dim) where ``drop`` (B,) bool is true."""
        return torch.where(drop[:, None, None], self.dropout_embedding, condition)


class PerTokenDiT(nn.Module):
    """Diffusion transformer conditioned token by token, the head of Scale-RAE.

    The defaults are the published head of 2.4 billion parameters.

    Args:
        input_size: height and width of the latents.
        in_channels: channels of the latents.
        condition_dim: channels of a condition vector; the time embedding has the same width.
        hidden_size: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        condition_dropout_prob: probability of the null condition in training; with 0 the model has
            no null condition and cannot be guided.

    Raises:
        UserError: the sizes are incompatible.
    """

    def __init__(
        self,
        input_size: int = 16,
        in_channels: int = 1152,
        condition_dim: int = 2048,
        hidden_size: int = 2048,
        depth: int = 32,
        num_heads: int = 32,
        condition_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.settings = constructor_arguments(locals())
        self.input_size, self.in_channels = input_size, in_channels
        self.condition_dropout_prob = condition_dropout_prob
        self.x_embedder = PatchEmbed(input_size, 1, in_channels, hidden_size)
        self.t_embedder = FixedTimestepEmbedder(condition_dim)
        self.y_embedder = NullCondition(condition_dim) if condition_dropout_prob > 0 else None
        table = sincos_positions(hidden_size, input_size)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.feat_rope = RotaryEmbedding(channels_per_head(hidden_size, num_heads), input_size)
        self.dit_blocks = nn.ModuleList(
            _block(hidden_size, num_heads, condition_dim) for _ in range(depth)
        )
        self.final_layer = _final_layer(hidden_size, in_channels, condition_dim)
        self.init_weights()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the position table."""
        self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[-1], self.input_size))

    def init_weights(self) -> None:
        """Initialise all parameters and tables, as after ``to_empty``."""
        init_weights(self, linear=xavier_linear)

    @property
    def null_condition(self) -> Tensor:
        """The learned null vector, (condition_dim,), for classifier-free guidance.

        Raises:
            UserError: the model was built without condition dropout.
        """
        if self.y_embedder is None:
            raise UserError(
                "this model was trained without condition dropout and has no null condition: "
                "sample it with guidance scale 1"
            )
        return self.y_embedder.dropout_embedding

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Predict the velocity of noisy latents.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is noise.
            y: condition vectors (B, H·W, condition_dim), in the row-major order of the latents.
            drop: (B,) bool, the images whose condition is replaced by the null condition.

        Returns:
            (B, C, H, W).

        Raises:
            UserError: a shape is wrong, or ``drop`` is given to a model without null condition.
        """
        h = self.x_embedder(x) + self.pos_embed
        if y.shape[1] != h.shape[1]:
            raise UserError(
                f"the head needs one condition vector per latent token ({h.shape[1]}), got "
                f"{y.shape[1]}; set the number of queries to {h.shape[1]}"
            )
        if drop is not None:
            if self.y_embedder is None:
                raise UserError("drop: the model has no null condition; use dropout probability 0")
            y = self.y_embedder(y, drop)
        # The reference applies SiLU here and again in every adaptive norm.
        c = F.silu(self.t_embedder(t)[:, None] + y)
        rope = self.feat_rope()
        for block in self.dit_blocks:
            h = block(h, c, rope)
        tokens = self.final_layer(h, c)
        return tokens.transpose(1, 2).unflatten(2, (self.input_size, self.input_size))


def _block(dim: int, num_heads: int, condition_dim: int) -> DiTBlock:
    """Build a block whose modulation is computed from vectors of ``condition_dim`` channels."""
    block = DiTBlock(dim, num_heads)
    block.adaLN_modulation = nn.Sequential(nn.SiLU(), FusedLinear(condition_dim, dim, 6))
    return block


def _final_layer(dim: int, out_features: int, condition_dim: int) -> FinalLayer:
    layer = FinalLayer(dim, out_features, use_rmsnorm=True)
    layer.adaLN_modulation = nn.Sequential(nn.SiLU(), FusedLinear(condition_dim, dim, 2))
    return layer
