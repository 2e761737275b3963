"""LightningDiT: a diffusion transformer with RoPE, RMSNorm and SwiGLU (Yao et al. 2025)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    SinusoidalTimestepEmbedder,
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
    xavier_linear,
)
from rae_xla.models.pretrained.mixin import PretrainedTransformer
from rae_xla.models.weights import constructor_arguments
from rae_xla.ops.rotary import RotaryEmbedding


class LightningDiT(PretrainedTransformer):
    """Diffusion transformer of adaLN-Zero blocks, each called as ``block(x, c, rope)``.

    With ``conditioning="tokens"`` blocks are not modulated and called as ``block(x, rope)``.
    State-dict keys are the published ones; those of RAEv2 are converted when files are read and
    written (``pretrained.dit_layouts``). The defaults are the XL size.

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
        use_pos_embed: add a fixed sine-cosine position table to the tokens.
        conditioning: ``adaln``: time and label modulate every block and the final norm. ``tokens``:
            they are tokens that the blocks attend to, and nothing is modulated (RAEv2).
        num_t_tokens: number of time tokens, with ``tokens``.
        num_c_tokens: number of label tokens, with ``tokens``.
        base_model_depth: number of the block, from 1, whose tokens the base head reads; None for
            no base head.
        repa_layer_depth: number of the block, from 1, whose tokens are projected to the features of
            another encoder; None for no projection.
        z_dim: channels of those features.

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
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.conditioning = conditioning
        modulated = conditioning == "adaln"
        num_t_tokens, num_c_tokens = context_sizes(conditioning, num_t_tokens, num_c_tokens)
        check_depth("base_model_depth", base_model_depth, depth)
        check_depth("repa_layer_depth", repa_layer_depth, depth)
        self.base_model_depth, self.repa_layer_depth = base_model_depth, repa_layer_depth
        if not (use_gembed or modulated):
            raise UserError(
                "use_gembed: conditioning by tokens embeds the time by random Fourier features; "
                "set use_gembed to true"
            )
        out_features = (2 if learn_sigma else 1) * in_channels * patch_size**2

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = (
            TimestepEmbedder(hidden_size, num_tokens=num_t_tokens)
            if use_gembed
            else SinusoidalTimestepEmbedder(hidden_size)
        )
        self.y_embedder = LabelEmbedder(
            num_classes, hidden_size, class_dropout_prob, num_tokens=num_c_tokens
        )
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            table = sincos_positions(hidden_size, self.x_embedder.grid_size)[None]
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.feat_rope: RotaryEmbedding | None = None
        if use_rope:
            self.feat_rope = RotaryEmbedding(
                channels_per_head(hidden_size, num_heads),
                self.x_embedder.grid_size,
                num_t_tokens + num_c_tokens,
            )
        options: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "use_qknorm": use_qknorm,
            "use_swiglu": use_swiglu,
            "use_rmsnorm": use_rmsnorm,
        }
        block = partial(DiTBlock, wo_shift=wo_shift) if modulated else TransformerBlock
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, **options) for _ in range(depth))
        final_layer = partial(
            FinalLayer, hidden_size, out_features, use_rmsnorm=use_rmsnorm, modulated=modulated
        )
        self.final_layer = final_layer()
        mark_read_blocks(list(self.blocks), base_model_depth, repa_layer_depth)
        self.base_final_layer = None if base_model_depth is None else final_layer()
        self.repa_projector = repa_projector(repa_layer_depth, hidden_size, z_dim)
        self.init_weights()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the position table."""
        if self.pos_embed is None:
            return
        self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[-1], self.x_embedder.grid_size))

    def init_weights(self) -> None:
        """Initialise all parameters and tables, as after ``to_empty``."""
        init_weights(self, linear=xavier_linear)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        label_drop: Tensor | None = None,
        all_outputs: bool = False,
    ) -> Tensor | DenoiserOutputs:
        """Predict the velocity of noisy latents, or what else the model was trained to predict.

        Args:
            x: noisy latents (B, C, H, W).
            t: times (B,) in [0, 1]; 0 is data, 1 is noise.
            y: class labels (B,) int64.
            label_drop: (B,) bool, the rows that get the null label. If None, they are chosen with
                PyTorch's global generator in train mode, and there are none in eval mode.
            all_outputs: also return the outputs of the base head and of the REPA projection.

        Returns:
            (B, C, H, W), or with ``all_outputs`` all predictions.

        Raises:
            UserError: if ``x`` does not have the shape that the model was built for, or, on CPU,
                if a label is out of range.
        """
        time = self.t_embedder(t)
        c: Tensor | None = None
        context: tuple[Tensor, ...] = ()
        if self.conditioning == "adaln":
            c = (time + self.y_embedder(y, label_drop))[:, None]
        else:
            embedder: Any = self.t_embedder
            context = embedder.tokens(time), self.y_embedder.tokens(y, label_drop)
        h = self.x_embedder(x)
        length = h.shape[1]
        if self.pos_embed is not None:
            h = h + self.pos_embed
        if context:
            h = append_tokens(h, *context)
        rope = self.feat_rope() if self.feat_rope is not None else None
        inputs: tuple[Any, ...] = (rope,) if c is None else (c, rope)
        base: Tensor | None = None
        repa: Tensor | None = None
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, *inputs)
            if depth == self.base_model_depth:
                base = h[:, :length]
            if depth == self.repa_layer_depth:
                repa = h[:, :length]
        if context:
            h = h[:, :length]
        full = self._to_latents(self.final_layer(h, c))
        if not all_outputs:
            return full
        if self.base_final_layer is not None and base is not None:
            base = self._to_latents(self.base_final_layer(base, c))
        if self.repa_projector is not None and repa is not None:
            repa = self.repa_projector(repa)
        return DenoiserOutputs(full, base, repa)

    def _to_latents(self, patches: Tensor) -> Tensor:
        return self.unpatchify(patches)[:, : self.in_channels]

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Arrange tokens (B, L, p·p·C) as latents (B, C, H, W).

        The values of a patch of side p are ordered by row, column, channel.
        """
        return unpatchify(tokens, self.x_embedder.grid_size, self.patch_size)
