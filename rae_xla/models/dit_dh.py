"""DiT-DH: a diffusion transformer with a shallow, wide head.

Sources: RAE (Zheng et al. 2025), section 5; DDT (Wang et al. 2025); RAEv2 (arXiv 2605.18324) for
in-context conditioning and the base head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.errors import UserError
from rae_xla.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    append_tokens,
    context_sizes,
    sincos_positions,
    unpatchify,
)
from rae_xla.models.intermediate_heads import (
    DenoiserOutputs,
    check_depth,
    mark_read_blocks,
    repa_projector,
)
from rae_xla.models.layers import (
    DiTBlock,
    FinalLayer,
    TransformerBlock,
    channels_per_head,
    init_weights,
)
from rae_xla.models.pretrained.mixin import PretrainedTransformer
from rae_xla.models.weights import constructor_arguments
from rae_xla.ops.rotary import RotaryEmbedding


class DiTDH(PretrainedTransformer):
    """Diffusion transformer whose deep encoder conditions a shallow, wide head token by token.

    Published as ``DiTwDDTHead``; state-dict keys are the published ones of RAE. Those of RAEv2 are
    converted when files are read and written (``pretrained.dit_layouts``). ``blocks`` contains the
    encoder's blocks, then the head's, each called as ``block(x, c, rope)``; with
    ``conditioning="tokens"`` the encoder's as ``block(x, rope)``. The defaults are the XL size.

    Args:
        input_size: height and width of the latents.
        patch_size: patch size of [encoder, head], or one number for both. With a head's of 1, an
            encoder with another one (a published layout without a working encoder) cannot run:
            ``forward`` then requires ``s``. Otherwise both must be equal.
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
        conditioning: ``adaln``: time and label modulate every block of the encoder. ``tokens``:
            they are tokens that the encoder's blocks attend to, without modulation (in-context
            conditioning, as published by RAEv2). The head is modulated in both cases.
        num_t_tokens: number of time tokens, with ``tokens``.
        num_c_tokens: number of label tokens, with ``tokens``.
        base_model_depth: number of the encoder's block, from 1, whose tokens the base head reads;
            None for no base head.
        repa_layer_depth: number of the encoder's block, from 1, whose tokens are projected to the
            features of another encoder; None for no projection.
        z_dim: channels of those features.

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
        conditioning: str = "adaln",
        num_t_tokens: int = 4,
        num_c_tokens: int = 8,
        base_model_depth: int | None = None,
        repa_layer_depth: int | None = None,
        z_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = constructor_arguments(locals())
        encoder_width, head_width = encoder_and_head("hidden_size", hidden_size)
        encoder_heads, head_heads = encoder_and_head("num_heads", num_heads)
        self.encoder_depth, head_depth = encoder_and_head("depth", depth)
        self.encoder_patch, head_patch = encoder_and_head("patch_size", patch_size)
        if head_patch not in (1, self.encoder_patch):
            raise UserError(
                "patch_size: the head of DiTDH requires the encoder's patch size, or 1, got "
                f"{patch_size}; set patch_size to one number"
            )
        self.head_patch = head_patch
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.conditioning = conditioning
        num_t_tokens, num_c_tokens = context_sizes(conditioning, num_t_tokens, num_c_tokens)
        check_depth("base_model_depth", base_model_depth, self.encoder_depth)
        check_depth("repa_layer_depth", repa_layer_depth, self.encoder_depth)
        self.base_model_depth, self.repa_layer_depth = base_model_depth, repa_layer_depth

        self.x_embedder = PatchEmbed(input_size, head_patch, in_channels, head_width)
        patch_channels = in_channels * (self.encoder_patch // head_patch) ** 2
        self.s_embedder = PatchEmbed(input_size, self.encoder_patch, patch_channels, encoder_width)
        self.s_projector = (
            nn.Identity() if encoder_width == head_width else nn.Linear(encoder_width, head_width)
        )
        self.t_embedder = TimestepEmbedder(encoder_width, num_tokens=num_t_tokens)
        self.y_embedder = LabelEmbedder(
            num_classes, encoder_width, class_dropout_prob, num_tokens=num_c_tokens
        )
        out_features = in_channels * head_patch**2
        self.final_layer = FinalLayer(head_width, out_features, use_rmsnorm=use_rmsnorm)

        grid = self.s_embedder.grid_size
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            table = sincos_positions(encoder_width, grid)[None]
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.enc_feat_rope: RotaryEmbedding | None = None
        self.dec_feat_rope: RotaryEmbedding | None = None
        if use_rope:
            self.enc_feat_rope = RotaryEmbedding(
                channels_per_head(encoder_width, encoder_heads), grid, num_t_tokens + num_c_tokens
            )
            self.dec_feat_rope = RotaryEmbedding(
                channels_per_head(head_width, head_heads), self.x_embedder.grid_size
            )

        options: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "use_qknorm": use_qknorm,
            "use_swiglu": use_swiglu,
            "use_rmsnorm": use_rmsnorm,
        }
        modulated: Callable[..., nn.Module] = partial(DiTBlock, wo_shift=wo_shift)
        plain: Callable[..., nn.Module] = TransformerBlock
        encoder_block = modulated if conditioning == "adaln" else plain
        encoder = [
            encoder_block(encoder_width, encoder_heads, **options)
            for _ in range(self.encoder_depth)
        ]
        head = [modulated(head_width, head_heads, **options) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(encoder + head)
        mark_read_blocks(encoder, base_model_depth, repa_layer_depth, self.encoder_depth)
        self.base_final_layer: FinalLayer | None = None
        if base_model_depth is not None:
            self.base_final_layer = FinalLayer(encoder_width, out_features, use_rmsnorm=use_rmsnorm)
        self.repa_projector = repa_projector(repa_layer_depth, encoder_width, z_dim)

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
            UserError: if the encoder's patch size is not the head's.
        """
        return self._encode(x, t, y, label_drop)[0]

    def _encode(
        self, x: Tensor, t: Tensor, y: Tensor, label_drop: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the conditioning tokens of the head, and the tokens that the other heads read.

        Returns:
            ``silu(time + tokens)`` after the last block and, for the base head, after its block
            (None without one); the tokens that the REPA projection reads (None without one). Each
            is (B, L, D_encoder).
        """
        if self.encoder_patch != self.head_patch:
            raise UserError(
                f"patch_size: the encoder of DiTDH cannot run with a patch size of "
                f"{self.encoder_patch} and a head's of {self.head_patch}; pass s to forward, or "
                "set patch_size to one number"
            )
        embedding = self.t_embedder(t)
        time = embedding[:, None]
        inputs: tuple[Any, ...] = ()
        context: tuple[Tensor, ...] = ()
        if self.conditioning == "adaln":
            inputs = (F.silu(time + self.y_embedder(y, label_drop)[:, None]),)
        else:
            context = self.t_embedder.tokens(embedding), self.y_embedder.tokens(y, label_drop)
        s = self.s_embedder(x)
        length = s.shape[1]
        if self.pos_embed is not None:
            s = s + self.pos_embed
        if context:
            s = append_tokens(s, *context)
        inputs += (self.enc_feat_rope() if self.enc_feat_rope is not None else None,)
        inputs += self._attention_bias(y)
        base: Tensor | None = None
        repa: Tensor | None = None
        for depth, block in enumerate(self.blocks[: self.encoder_depth], start=1):
            s = block(s, *inputs)
            if depth == self.base_model_depth:
                base = F.silu(time + s[:, :length])
            if depth == self.repa_layer_depth:
                repa = s[:, :length]
        if context:
            s = s[:, :length]
        return F.silu(time + s), base, repa

    def _attention_bias(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return the bias of the encoder's attention, if there is one, as a further input."""
        return ()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        s: Tensor | None = None,
        label_drop: Tensor | None = None,
        all_outputs: bool = False,
    ) -> Tensor | DenoiserOutputs:
        """Predict the velocity of noisy latents, or what else the model was trained to predict.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is noise.
            y: class labels (B,) int64.
            s: conditioning tokens (B, Ls, D_encoder) that replace the encoder's, so that ``t``
                and ``y`` have no effect; Ls divides the number of the head's tokens.
            label_drop: (B,) bool, the rows that get the null label. If None, they are chosen with
                PyTorch's global generator in train mode, and there are none in eval mode.
            all_outputs: also return the outputs of the base head and of the REPA projection.

        Returns:
            (B, C, H, W), or with ``all_outputs`` all predictions.

        Raises:
            UserError: if ``x`` does not have the shape that the model was built for, or, on CPU,
                if a label is out of range.
        """
        base: Tensor | None = None
        repa: Tensor | None = None
        if s is None:
            s, base, repa = self._encode(x, t, y, label_drop)
        c = self.s_projector(s)
        h = self.x_embedder(x)
        rope = self.dec_feat_rope() if self.dec_feat_rope is not None else None
        for block in self.blocks[self.encoder_depth :]:
            h = block(h, c, rope)
        full = self._to_latents(self.final_layer(h, c), x)
        if not all_outputs:
            return full
        if self.base_final_layer is not None and base is not None:
            base = self._to_latents(self.base_final_layer(base, base), x)
        if self.repa_projector is not None and repa is not None:
            repa = self.repa_projector(repa)
        return DenoiserOutputs(full, base, repa)

    def _to_latents(self, patches: Tensor, like: Tensor) -> Tensor:
        """Arrange the values of patches (B, L, p·p·C) as latents with the shape of ``like``."""
        if self.head_patch == 1:
            return patches.transpose(1, 2).reshape(like.shape)
        return unpatchify(patches, self.x_embedder.grid_size, self.head_patch)


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
