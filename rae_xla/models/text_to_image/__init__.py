"""The text-to-image model: a language model whose hidden states condition a diffusion head."""

from rae_xla.models.text_to_image.head import PerTokenDiT

__all__ = ["PerTokenDiT"]
