"""Representation autoencoder: a frozen encoder, a trained decoder and normalised latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.decoder import ViTDecoder
from rae_xla.models.encoders import read_image_statistics
from rae_xla.models.encoders.build import build_encoder
from rae_xla.models.pretrained.latent_statistics import (
    read_latent_statistics,
    standard_deviation,
)
from rae_xla.models.pretrained.mixin import PretrainedAutoencoder
from rae_xla.models.state_dicts import strip_wrappers
from rae_xla.models.weights import is_meta, load_strict, read_weight_file
from rae_xla.ops.resize import resize_bicubic

HUB_REPOSITORY = "nyu-visionx/RAE-collections"
DECODER_OUTPUTS = ("normalized", "pixels")


class RAE(PretrainedAutoencoder):
    """Representation autoencoder (Zheng et al. 2025, section 3).

    Images are floats in [0, 1] of shape (B, 3, H, W). Latents are maps (B, C, h, w), or tokens
    (B, N, C) without ``reshape_to_2d``. State-dict keys are the published ones, ``encoder.*`` and
    ``decoder.*``; image and latent statistics are buffers outside the state dict.

    The encoder is frozen and always in eval mode; ``train()`` affects the decoder and the noise.

    On the meta device (``with torch.device("meta")``) only configurations are read, no weights.

    Args:
        encoder_cls: our name or the published name of the encoder, a key of ``ENCODERS``.
        encoder_config_path: model folder or hub id that defines the image normalisation; or, on
            the meta device, the encoder's configuration.
        encoder_input_size: size in pixels that images are resized to for the encoder.
        encoder_params: arguments of the encoder. Its model folder is ``encoder_config_path`` by
            default.
        decoder_config_path: ``config.json`` of a ``vit_mae`` model, its folder, or its content.
        decoder_patch_size: side of a decoded patch in pixels.
        pretrained_decoder_path: weight file of the decoder alone; random weights if None.
        noise_tau: strength of the noise added to tokens in train mode (section 4.3); 0 for none.
        reshape_to_2d: whether latents are maps rather than tokens.
        normalization_stat_path: file with ``var`` and optionally ``mean`` of the latents.
        eps: added to ``var`` before the square root.
        decoder_output: ``normalized``: the decoder predicts images that are normalised like the
            encoder's. ``pixels``: it predicts images in [0, 1], as in RAEv2.
        image_mean: per-channel mean that normalises the encoder's images, instead of that in its
            folder.
        image_std: per-channel standard deviation, likewise; given together with ``image_mean``.

    Raises:
        UserError: if a name, size, folder or file is invalid.
    """

    encoder_mean: Tensor
    encoder_std: Tensor
    latent_mean: Tensor | None
    latent_std: Tensor | None

    def __init__(
        self,
        encoder_cls: str = "Dinov2withNorm",
        encoder_config_path: str | Mapping[str, Any] = "facebook/dinov2-with-registers-base",
        encoder_input_size: int = 224,
        encoder_params: Mapping[str, Any] | None = None,
        decoder_config_path: str | Path | Mapping[str, Any] = "configs/decoder/ViTXL",
        decoder_patch_size: int = 16,
        pretrained_decoder_path: str | None = None,
        noise_tau: float = 0.8,
        reshape_to_2d: bool = True,
        normalization_stat_path: str | None = None,
        eps: float = 1e-5,
        decoder_output: str = "normalized",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if decoder_output not in DECODER_OUTPUTS:
            raise UserError(
                f"decoder_output: {decoder_output!r} is not one of {', '.join(DECODER_OUTPUTS)}"
            )
        self.decoder_output = decoder_output
        if noise_tau < 0:
            raise UserError(f"noise_tau must be at least 0, got {noise_tau}")
        if not isinstance(encoder_config_path, Mapping):
            encoder_config_path = str(encoder_config_path)
        self.encoder_input_size = encoder_input_size
        self.noise_tau = noise_tau
        self.reshape_to_2d = reshape_to_2d
        self.encoder = build_encoder(
            encoder_cls, encoder_config_path, encoder_input_size, dict(encoder_params or {})
        )
        patch = self.encoder.patch_size
        if encoder_input_size < 1 or encoder_input_size % patch:
            raise UserError(
                f"encoder_input_size {encoder_input_size} must be a multiple of the encoder's "
                f"patch size {patch}, such as {max(1, round(encoder_input_size / patch)) * patch}"
            )
        self.grid = encoder_input_size // patch
        self.decoder = ViTDecoder(
            decoder_config_path,
            self.num_tokens,
            hidden_size=self.encoder.hidden_size,
            patch_size=decoder_patch_size,
        )
        if pretrained_decoder_path is not None and not is_meta(self):
            _load_decoder(self.decoder, pretrained_decoder_path)
        self._read_image_statistics(encoder_config_path, image_mean, image_std)
        self._read_latent_statistics(normalization_stat_path, eps)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one image."""
        return self.grid**2

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one image's latents."""
        return self.encoder.hidden_size, self.grid, self.grid

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that ``decode`` returns."""
        return self.grid * self.decoder.config.patch_size

    @torch.no_grad()
    def encode(self, images: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Encode images to normalised latents.

        Images of another size than ``encoder_input_size`` are resized to it bicubically, without
        preserving the aspect ratio. In train mode, ``add_noise`` is applied to the tokens.

        Args:
            images: (B, 3, H, W) in [0, 1].
            noise: random numbers for ``add_noise``; ignored in eval mode.

        Returns:
            (B, C, h, w), or (B, N, C) without ``reshape_to_2d``.

        Raises:
            UserError: if ``images`` has another shape.
        """
        if images.ndim != 4 or images.shape[1] != self.encoder_mean.shape[1]:
            raise UserError(
                f"RAE.encode expects images of shape (batch, {self.encoder_mean.shape[1]}, height, "
                f"width), got {tuple(images.shape)}"
            )
        tokens = self.encode_tokens(images)
        if self.training and self.noise_tau > 0:
            tokens = self.add_noise(tokens, noise)
        return self.to_latents(tokens)

    @torch.no_grad()
    def encode_tokens(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to tokens (B, N, C), without noise."""
        images = resize_bicubic(images, self.encoder_input_size)
        return self.encoder((images - self.encoder_mean) / self.encoder_std)

    def add_noise(self, tokens: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Add ``noise_tau * level * normal`` to tokens, as in training (section 4.3).

        Args:
            tokens: (B, N, C).
            noise: ``level`` (B,), uniform in [0, 1), and ``normal`` (B, N, C), standard normal. If
                None, they are generated with PyTorch's global generator.
        """
        if noise is None:
            level = torch.rand(tokens.shape[0], 1, 1, dtype=tokens.dtype, device=tokens.device)
            noise = level, torch.randn_like(tokens)
        level, normal = noise
        return tokens + self.noise_tau * level.reshape(-1, 1, 1) * normal

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Arrange tokens (B, N, C) as latents and normalise them."""
        if self.reshape_to_2d:
            tokens = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.latent_mean is not None:
            tokens = tokens - self.latent_mean
        return tokens if self.latent_std is None else tokens / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images.

        Args:
            latents: (B, C, h, w), or (B, N, C) without ``reshape_to_2d``.

        Returns:
            (B, 3, image_size, image_size), not clamped to [0, 1].

        Raises:
            UserError: if the latents have another shape.
        """
        if latents.ndim != (4 if self.reshape_to_2d else 3):
            shape = "(batch, C, h, w)" if self.reshape_to_2d else "(batch, N, C)"
            raise UserError(
                f"RAE.decode expects latents of shape {shape}, got {tuple(latents.shape)}"
            )
        if self.latent_std is not None:
            _check_shape(self.latent_std, latents.shape[1:], "the latents to decode")
            latents = latents * self.latent_std
        if self.latent_mean is not None:
            latents = latents + self.latent_mean
        tokens = latents.flatten(2).transpose(1, 2) if self.reshape_to_2d else latents
        images = self.decoder.unpatchify(self.decoder(tokens))
        if self.decoder_output == "pixels":
            return images
        return images * self.encoder_std + self.encoder_mean

    def forward(self, images: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Reconstruct images: ``decode(encode(images, noise))``."""
        return self.decode(self.encode(images, noise))

    def set_image_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation, per channel, that normalise the encoder's images."""
        self.register_buffer("encoder_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("encoder_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def set_latent_statistics(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Set the mean and standard deviation that normalise latents.

        Args:
            mean: broadcastable to one image's latents, or None for no shift.
            std: broadcastable to one image's latents, or None for no scale.

        Raises:
            UserError: if a shape does not match the latents.
        """
        channels, height, width = self.latent_size
        shape = self.latent_size if self.reshape_to_2d else (height * width, channels)
        for tensor in (mean, std):
            if tensor is not None:
                _check_shape(tensor, shape, "the latents")
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_std", std, persistent=False)

    def _read_image_statistics(
        self,
        folder: str | Mapping[str, Any],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        if (mean is None) != (std is None):
            raise UserError("image_mean and image_std must be given together")
        if mean is not None and std is not None:
            self.set_image_statistics(mean, std)
        elif is_meta(self) or isinstance(folder, Mapping):
            self.set_image_statistics([0.0] * 3, [1.0] * 3)
        else:
            self.set_image_statistics(*read_image_statistics(folder))

    def _read_latent_statistics(self, path: str | None, eps: float) -> None:
        mean: Tensor | None = None
        std: Tensor | None = None
        if path is not None and is_meta(self):
            mean, std = torch.zeros(self.latent_size), torch.ones(self.latent_size)
        elif path is not None:
            mean, var = read_latent_statistics(path)
            std = standard_deviation(var, eps)
            device = self.decoder.decoder_pos_embed.device
            mean, std = mean if mean is None else mean.to(device), std.to(device)
        try:
            self.set_latent_statistics(mean, std)
        except UserError as error:
            raise UserError(f"normalization_stat_path {path}: {error}") from None


def _load_decoder(decoder: ViTDecoder, path: str) -> None:
    key = "pretrained_decoder_path"
    if not Path(path).expanduser().is_file() and path.startswith("models/"):
        raise UserError(
            f"{key}: {path} does not exist; download published weights by `hf download "
            f"{HUB_REPOSITORY} {path.removeprefix('models/')} --local-dir models`"
        )
    if Path(path).expanduser().is_dir():
        raise UserError(
            f"{key}: {path} is a folder; if it is a training checkpoint, extract the decoder by "
            f"`rae-xla checkpoints export {path} --what decoder --out decoder.pt`"
        )
    state = read_weight_file(path, key)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        kind = "a training checkpoint" if _is_checkpoint(state) else "not a state dict"
        raise UserError(
            f"{key}: {path} is {kind}, but must contain the decoder's weights only; extract them "
            f"from a checkpoint by `rae-xla checkpoints export {path} --what decoder --out "
            "decoder.pt`, or set stage_1.ckpt to the checkpoint"
        )
    state = strip_wrappers(state, f"{key}: {path}")
    if any(name.startswith("decoder.") for name in state):
        raise UserError(
            f"{key}: {path} contains a complete RAE (keys such as decoder.decoder_embed.weight); "
            "export the decoder first, or set stage_1.ckpt to this file"
        )
    load_strict(decoder, state, f"{key}: {path}")


def _is_checkpoint(state: Any) -> bool:
    return isinstance(state, Mapping) and bool({"model", "ema", "optimizer"} & state.keys())


def _check_shape(statistics: Tensor, shape: tuple[int, ...] | torch.Size, name: str) -> None:
    """Raise if statistics do not broadcast to ``shape``, that of the latents called ``name``."""
    # Compared here because torch.broadcast_shapes imports sympy, which takes most of a second.
    sizes = (1,) * (len(shape) - statistics.ndim) + tuple(statistics.shape)
    fits = (own in (1, size) for own, size in zip(sizes, shape, strict=False))
    if len(sizes) != len(shape) or not all(fits):
        raise UserError(
            f"{name} have shape {tuple(shape)}, but the latent statistics have "
            f"shape {tuple(statistics.shape)}"
        )
