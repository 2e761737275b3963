"""DiT-DH: a diffusion transformer with a shallow, wide head.

Sources: RAE (Zheng et al. 2025), section 5; DDT (Wang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.errors import UserError
from rae_xla.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from rae_xla.models.layers import (
    DiTBlock,
    FinalLayer,
    channels_per_head,
    init_weights,
)
from rae_xla.models.pretrained.mixin import PretrainedTransformer
from rae_xla.models.weights import constructor_arguments
from rae_xla.ops.rotary import RotaryEmbedding


class DiTDH(PretrainedTransformer):
    """Diffusion transformer whose deep encoder conditions a shallow, wide head token by token.

    Published as ``DiTwDDTHead``; state-dict keys are the published ones. ``blocks`` contains the
    encoder's blocks, then the head's, each called as ``block(x, c, rope)``. The defaults are the
    XL size.

    Args:
        input_size: height and width of the latents.
        patch_size: patch size of [encoder, head], or one number for both. The head's must be 1.
            An encoder with another one (a published layout without a working encoder) cannot run:
            ``forward`` then requires ``s``.
        in_channels: channels of the latents.
        hidden_size: width of the tokens in [encoder, head].
        depth: number of blocks of [encoder, head].
        num_heads: attention heads per block of [encoder, head], or one number for both.
        mlp_ratio: hidden width of the feed-forward layers over their width.
        class_dropout_prob: probability of the null label in training; with 0 the model has no
            null label.
        num_classes: number of class labels; the null label is ``num_classes``.
        use_qknorm: normalise queries and keys per head.
        use_swiglu: SwiGLU feed-forward layers; otherwise tanh-GELU.
        use_rope: rotary positions in every attention layer.
        use_rmsnorm: RMSNorm; otherwise LayerNorm.
        wo_shift: omit the shifts of the blocks' modulation.
        use_pos_embed: add a fixed sine-cosine position table to the encoder's tokens.

    Raises:
        UserError: if the sizes are incompatible.
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int | Sequence[int] = 1,
        in_channels: int = 768,
        hidden_size: Sequence[int] = (1152, 2048),
        depth: Sequence[int] = (28, 2),
        num_heads: int | Sequence[int] = (16, 16),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_pos_embed: bool = True,
    ) -> None:
        super().__init__()
        self.settings = constructor_arguments(locals())
        encoder_width, head_width = encoder_and_head("hidden_size", hidden_size)
        encoder_heads, head_heads = encoder_and_head("num_heads", num_heads)
        self.encoder_depth, head_depth = encoder_and_head("depth", depth)
        self.encoder_patch, head_patch = encoder_and_head("patch_size", patch_size)
        if head_patch != 1:
            raise UserError(
                f"patch_size: the head of DiTDH requires a patch size of 1, got {patch_size}; "
                "set patch_size to 1"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes

        self.x_embedder = PatchEmbed(input_size, 1, in_channels, head_width)
        patch_channels = in_channels * self.encoder_patch**2
        self.s_embedder = PatchEmbed(input_size, self.encoder_patch, patch_channels, encoder_width)
        self.s_projector = (
            nn.Identity() if encoder_width == head_width else nn.Linear(encoder_width, head_width)
        )
        self.t_embedder = TimestepEmbedder(encoder_width)
        self.y_embedder = LabelEmbedder(num_classes, encoder_width, class_dropout_prob)
        self.final_layer = FinalLayer(head_width, in_channels, use_rmsnorm=use_rmsnorm)

        grid = self.s_embedder.grid_size
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            table = sincos_positions(encoder_width, grid)[None]
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.enc_feat_rope: RotaryEmbedding | None = None
        self.dec_feat_rope: RotaryEmbedding | None = None
        if use_rope:
            self.enc_feat_rope = RotaryEmbedding(
                channels_per_head(encoder_width, encoder_heads), grid
            )
            self.dec_feat_rope = RotaryEmbedding(
                channels_per_head(head_width, head_heads), input_size
            )

        def block(dim: int, heads: int) -> DiTBlock:
            return DiTBlock(
                dim,
                heads,
                mlp_ratio,
                use_qknorm=use_qknorm,
                use_swiglu=use_swiglu,
                use_rmsnorm=use_rmsnorm,
                wo_shift=wo_shift,
            )

        encoder = [block(encoder_width, encoder_heads) for _ in range(self.encoder_depth)]
        head = [block(head_width, head_heads) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(encoder + head)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the position table."""
        if self.pos_embed is not None:
            table = sincos_positions(self.pos_embed.shape[-1], self.s_embedder.grid_size)
            self.pos_embed.copy_(table)

    def init_weights(self) -> None:
        """Initialise all parameters and tables, as after ``to_empty``."""
        init_weights(self)

    def encode(self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None = None) -> Tensor:
        """Return the conditioning tokens (B, L, D_encoder) that ``forward`` uses by default.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1].
            y: class labels (B,) int64.
            label_drop: rows that get the null label; see ``forward``.

        Raises:
            UserError: if the encoder's patch size is not 1.
        """
        if self.encoder_patch != 1:
            raise UserError(
                f"patch_size: the encoder of DiTDH cannot run with a patch size of "
                f"{self.encoder_patch}; pass s to forward, or set patch_size to 1"
            )
        time = self.t_embedder(t)[:, None]
        c = F.silu(time + self.y_embedder(y, label_drop)[:, None])
        s = self.s_embedder(x)
        if self.pos_embed is not None:
            s = s + self.pos_embed
        rope = self.enc_feat_rope() if self.enc_feat_rope is not None else None
        for block in self.blocks[: self.encoder_depth]:
            s = block(s, c, rope)
        return F.silu(time + s)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        s: Tensor | None = None,
        label_drop: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of noisy latents.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is noise.
            y: class labels (B,) int64.
            s: conditioning tokens (B, Ls, D_encoder) that replace the encoder's, so that ``t``
                and ``y`` have no effect; Ls divides H·W.
            label_drop: (B,) bool, the rows that get the null label. If None, they are chosen with
                PyTorch's global generator in train mode, and there are none in eval mode.

        Returns:
            (B, C, H, W).

        Raises:
            UserError: if ``x`` does not have the shape that the model was built for, or, on CPU,
                if a label is out of range.
        """
        if s is None:
            s = self.encode(x, t, y, label_drop)
        c = self.s_projector(s)
        h = self.x_embedder(x)
        rope = self.dec_feat_rope() if self.dec_feat_rope is not None else None
        for block in self.blocks[self.encoder_depth :]:
            h = block(h, c, rope)
        return self.final_layer(h, c).transpose(1, 2).reshape(x.shape)


def encoder_and_head(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Parse an option that is given as [encoder, head], or as one number for both.

    Raises:
        UserError: if it is a sequence of another length.
    """
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise UserError(f"{name}: expected [encoder, head], got {list(value)}")
    return value[0], value[1]
