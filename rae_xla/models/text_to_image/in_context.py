"""The in-context head of RAEv2: the tokens of the prompt are tokens of a DiT-DH (arXiv 2605.18324).

The state dict is that of ``DiTDH``; ``pretrained.dit_layouts`` converts it to the one of RAEv2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.text_to_image.context import ContextEmbedder, context_bias
from rae_xla.models.weights import constructor_arguments


class InContextDiT(DiTDH):
    """DiT-DH whose encoder attends to the tokens of a context (``context.pack_context``).

    The defaults are the published sizes.

    Args:
        input_size: height and width of the latents.
        in_channels: channels of the latents.
        context_dim: channels of a condition vector.
        context_tokens: tokens of a context, padding included.
        hidden_size: width of the tokens in [encoder, head].
        depth: number of blocks of [encoder, head].
        num_heads: attention heads per block of [encoder, head].
        num_t_tokens: number of time tokens.
        base_model_depth: number of the encoder's block, from 1, that the base head reads; None for
            no base head.

    Raises:
        UserError: the sizes are incompatible.
    """

    def __init__(
        self,
        input_size: int = 16,
        in_channels: int = 1024,
        context_dim: int = 1024,
        context_tokens: int = 256,
        hidden_size: Sequence[int] = (1440, 2048),
        depth: Sequence[int] = (28, 2),
        num_heads: Sequence[int] = (20, 16),
        num_t_tokens: int = 4,
        base_model_depth: int | None = 8,
    ) -> None:
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            class_dropout_prob=0.0,
            num_classes=1,  # of the label embedder, which is replaced
            use_qknorm=True,
            use_pos_embed=False,
            conditioning="tokens",
            num_t_tokens=num_t_tokens,
            num_c_tokens=context_tokens,
            base_model_depth=base_model_depth,
        )
        self.settings = constructor_arguments(locals())
        self.y_embedder = ContextEmbedder(  # type: ignore[assignment]
            context_dim, self.t_embedder.learnable_tokens.shape[1]
        )

    def _attention_bias(self, y: Tensor) -> tuple[Tensor, ...]:
        others = self.s_embedder.grid_size**2 + self.t_embedder.num_tokens
        return (context_bias(y, others),)
