"""Construction of an encoder by name, and an encoder with its preprocessing of images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError, did_you_mean
from rae_xla.models.encoders import ENCODERS, FrozenEncoder, read_image_statistics
from rae_xla.ops.resize import resize_bicubic


def build_encoder(
    name: str, folder: str | Mapping[str, Any], input_size: int, params: dict[str, Any]
) -> FrozenEncoder:
    """Build an encoder in eval mode.

    Args:
        name: a key of ``ENCODERS``.
        folder: model folder or hub id; or, on the meta device, the configuration.
        input_size: side in pixels of the images that it receives.
        params: further arguments of its class.

    Raises:
        UserError: the name or an argument is unknown, or the class raises one.
    """
    if name not in ENCODERS:
        raise UserError(
            f"unknown encoder_cls {name!r}{did_you_mean(name, ENCODERS)}; "
            f"choose one of {', '.join(ENCODERS)}"
        )
    encoder_cls: Any = ENCODERS[name]
    known = list(inspect.signature(encoder_cls.__init__).parameters)[1:]
    for key in params:
        if key not in known:
            raise UserError(
                f"encoder_params: {name} has no parameter {key!r}{did_you_mean(key, known)}; "
                f"its parameters are {', '.join(known)}"
            )
    path = known[0]  # the first parameter of each encoder is its model folder
    encoder: FrozenEncoder = encoder_cls(**{path: folder, "input_size": input_size, **params})
    encoder.options = {key: value for key, value in params.items() if key != path}
    encoder.eval()  # its submodules too, whatever its constructor does
    return encoder


class PreprocessedEncoder(nn.Module):
    """A frozen encoder that resizes and normalises its images.

    Args:
        encoder: the encoder.
        input_size: side in pixels of the images that it receives.
        mean: per-channel mean that images are normalised with.
        std: per-channel standard deviation, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: FrozenEncoder, input_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.encoder, self.input_size = encoder, input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one image."""
        return (self.input_size // self.encoder.patch_size) ** 2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to tokens (B, N, C)."""
        images = resize_bicubic(images, self.input_size)
        tokens: Tensor = self.encoder((images - self.mean) / self.std)
        return tokens


def build_preprocessed(
    name: str, folder: str, input_size: int, params: Mapping[str, Any]
) -> PreprocessedEncoder:
    """Build an encoder with the preprocessing that its folder defines; see ``build_encoder``."""
    encoder = build_encoder(name, folder, input_size, dict(params))
    on_meta = next(encoder.parameters()).is_meta
    mean, std = ([0.0] * 3, [1.0] * 3) if on_meta else read_image_statistics(folder)
    return PreprocessedEncoder(encoder, input_size, mean, std)
