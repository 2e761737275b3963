"""LightningDiT: a diffusion transformer with RoPE, RMSNorm and SwiGLU (Yao et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae_xla.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    SinusoidalTimestepEmbedder,
    TimestepEmbedder,
    sincos_positions,
)
from rae_xla.models.layers import (
    DiTBlock,
    FinalLayer,
    channels_per_head,
    init_weights,
    xavier_linear,
)
from rae_xla.models.pretrained.mixin import PretrainedTransformer
from rae_xla.models.weights import constructor_arguments
from rae_xla.ops.rotary import RotaryEmbedding


class LightningDiT(PretrainedTransformer):
    """Diffusion transformer of adaLN-Zero blocks, each called as ``block(x, c, rope)``.

    State-dict keys are the published ones. The defaults are the XL size.

    Args:
        input_size: height and width of the latents.
        patch_size: side of the square of latent positions that forms one token.
        in_channels: channels of the latents.
        hidden_size: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the feed-forward layers over their width.
        class_dropout_prob: probability of the null label in training; with 0 the model has no
            null label.
        num_classes: number of class labels; the null label is ``num_classes``.
        learn_sigma: predict twice the channels, of which ``forward`` returns the first half.
        use_qknorm: normalise queries and keys per head.
        use_swiglu: SwiGLU feed-forward layers; otherwise tanh-GELU.
        use_rope: rotary positions in every attention layer.
        use_rmsnorm: RMSNorm; otherwise LayerNorm.
        wo_shift: omit the shifts of the blocks' modulation.
        use_gembed: embed the time by random Fourier features; otherwise by DiT's sinusoids.

    Raises:
        UserError: if the sizes are incompatible.
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_gembed: bool = True,
    ) -> None:
        super().__init__()
        self.settings = constructor_arguments(locals())
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = (TimestepEmbedder if use_gembed else SinusoidalTimestepEmbedder)(
            hidden_size
        )
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        table = sincos_positions(hidden_size, self.x_embedder.grid_size)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.feat_rope: RotaryEmbedding | None = None
        if use_rope:
            self.feat_rope = RotaryEmbedding(
                channels_per_head(hidden_size, num_heads), self.x_embedder.grid_size
            )
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio,
                use_qknorm=use_qknorm,
                use_swiglu=use_swiglu,
                use_rmsnorm=use_rmsnorm,
                wo_shift=wo_shift,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size, out_channels * patch_size**2, use_rmsnorm=use_rmsnorm
        )
        self.init_weights()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the position table."""
        self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[-1], self.x_embedder.grid_size))

    def init_weights(self) -> None:
        """Initialise all parameters and tables, as after ``to_empty``."""
        init_weights(self, linear=xavier_linear)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Predict the velocity of noisy latents.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is noise.
            y: class labels (B,) int64.
            label_drop: (B,) bool, the rows that get the null label. If None, they are chosen with
                PyTorch's global generator in train mode, and there are none in eval mode.

        Returns:
            (B, C, H, W).

        Raises:
            UserError: if ``x`` does not have the shape that the model was built for, or, on CPU,
                if a label is out of range.
        """
        c = (self.t_embedder(t) + self.y_embedder(y, label_drop))[:, None]
        h = self.x_embedder(x) + self.pos_embed
        rope = self.feat_rope() if self.feat_rope is not None else None
        for block in self.blocks:
            h = block(h, c, rope)
        return self.unpatchify(self.final_layer(h, c))[:, : self.in_channels]

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Arrange tokens (B, L, p·p·C) as latents (B, C, H, W).

        The values of a patch of side p are ordered by row, column, channel.
        """
        grid, p = self.x_embedder.grid_size, self.patch_size
        patches = tokens.reshape(tokens.shape[0], grid, grid, p, p, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
