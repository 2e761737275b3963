"""The representation autoencoder: a frozen encoder, a trained decoder, normalised latents."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.encoders import (
    DINOv2Encoder,
    FrozenEncoder,
    MAEEncoder,
    SigLIP2Encoder,
    image_mean_std,
)
from rae_xla.models.resize import resize_bicubic
from rae_xla.models.vit_decoder import ViTDecoder
from rae_xla.models.weights import is_meta, load_strict, read_weight_file

if TYPE_CHECKING:
    from collections.abc import Sequence

# Our names and the published ones.
ENCODERS: dict[str, type[FrozenEncoder]] = {
    "DINOv2Encoder": DINOv2Encoder,
    "Dinov2withNorm": DINOv2Encoder,
    "SigLIP2Encoder": SigLIP2Encoder,
    "SigLIP2wNorm": SigLIP2Encoder,
    "MAEEncoder": MAEEncoder,
    "MAEwNorm": MAEEncoder,
}
HUB_FILES = "nyu-visionx/RAE-collections"


class RAE(nn.Module):
    """Representation autoencoder (Zheng et al. 2025, section 3).

    Images are floats in [0, 1], shape (B, 3, H, W). Latents are (B, C, h, w), or tokens (B, N, C)
    without ``reshape_to_2d``. State-dict keys are the published ones: ``encoder.*`` and
    ``decoder.*``; image and latent statistics are not in the state dict.

    The encoder stays frozen and in eval mode; ``train()`` concerns the decoder and the noise.

    On the meta device (``with torch.device("meta")``) only configurations are read, no weights.

    Args:
        encoder_cls: which encoder, by our name or the published one (``ENCODERS``).
        encoder_config_path: model folder or hub id of the image processor (mean and std); or, on
            the meta device, the encoder's configuration.
        encoder_input_size: side in pixels that images are resized to for the encoder.
        encoder_params: arguments of the encoder; without a path, ``encoder_config_path`` is used.
        decoder_config_path: folder or file of a ``vit_mae`` config.json, or its settings.
        decoder_patch_size: side of a decoded patch in pixels.
        pretrained_decoder_path: weight file of the decoder alone; random weights when None.
        noise_tau: strength of the noise added to tokens in train mode (section 4.3); 0 for none.
        reshape_to_2d: whether latents are maps rather than tokens.
        normalization_stat_path: file with ``var`` and maybe ``mean`` of the latents.
        eps: added to ``var`` before the square root.

    Raises:
        UserError: if a name, size, folder or file is wrong; the message says which.
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
    ) -> None:
        super().__init__()
        if noise_tau < 0:
            raise UserError(f"noise_tau must not be negative, got {noise_tau}")
        if not isinstance(encoder_config_path, Mapping):
            encoder_config_path = str(encoder_config_path)
        self.encoder_input_size = encoder_input_size
        self.noise_tau = noise_tau
        self.reshape_to_2d = reshape_to_2d
        self.encoder = _build_encoder(
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
        self._read_image_statistics(encoder_config_path)
        self._read_latent_statistics(normalization_stat_path, eps)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: the square of the latent grid's side."""
        return self.grid**2

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one image's latents."""
        return self.encoder.hidden_size, self.grid, self.grid

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that ``decode`` returns."""
        return self.grid * self.decoder.config.patch_size

    @torch.no_grad()
    def encode(self, images: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to normalised latents.

        Images of another size than ``encoder_input_size`` are resized to it, bicubically and
        whatever their aspect. In train mode with ``noise_tau`` > 0 each token gets
        ``noise_tau * level * normal``: ``noise`` gives the two draws, level (B,) from U[0, 1) and
        normal (B, N, C); drawn from torch's generator when None. Ignored in eval mode.

        Raises:
            UserError: if ``images`` has another shape.
        """
        if images.ndim != 4 or images.shape[1] != self.encoder_mean.shape[1]:
            raise UserError(
                f"RAE.encode takes images of shape (batch, {self.encoder_mean.shape[1]}, height, "
                f"width), got {tuple(images.shape)}"
            )
        tokens = self.encode_tokens(images)
        if self.training and self.noise_tau > 0:
            tokens = self.add_noise(tokens, noise)
        return self.to_latents(tokens)

    @torch.no_grad()
    def encode_tokens(self, images: Tensor) -> Tensor:
        """The encoder's tokens (B, N, C) of images (B, 3, H, W) in [0, 1], without noise."""
        images = resize_bicubic(images, self.encoder_input_size)
        return self.encoder((images - self.encoder_mean) / self.encoder_std)

    def add_noise(self, tokens: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens (B, N, C) with the noise of training, see ``encode``."""
        if noise is None:
            level = torch.rand(tokens.shape[0], 1, 1, dtype=tokens.dtype, device=tokens.device)
            noise = level, torch.randn_like(tokens)
        level, normal = noise
        return tokens + self.noise_tau * level.reshape(-1, 1, 1) * normal

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) laid out and normalised as latents."""
        if self.reshape_to_2d:
            tokens = tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.latent_mean is not None:
            tokens = tokens - self.latent_mean
        return tokens if self.latent_std is None else tokens / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (B, 3, image_size, image_size), not clamped to [0, 1].

        Raises:
            UserError: if the latents have another shape.
        """
        if latents.ndim != (4 if self.reshape_to_2d else 3):
            shape = "(batch, C, h, w)" if self.reshape_to_2d else "(batch, N, C)"
            raise UserError(
                f"RAE.decode takes latents of shape {shape}, got {tuple(latents.shape)}"
            )
        if self.latent_std is not None:
            _check_shape(self.latent_std, latents.shape[1:], "the latents to decode")
            latents = latents * self.latent_std
        if self.latent_mean is not None:
            latents = latents + self.latent_mean
        tokens = latents.flatten(2).transpose(1, 2) if self.reshape_to_2d else latents
        images = self.decoder.unpatchify(self.decoder(tokens))
        return images * self.encoder_std + self.encoder_mean

    def forward(self, images: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Reconstruct images: ``decode(encode(images, noise))``."""
        return self.decode(self.encode(images, noise))

    def set_image_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Replace the mean and standard deviation of the encoder's images, per channel."""
        self.register_buffer("encoder_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("encoder_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def set_latent_statistics(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Replace the mean and standard deviation that latents are normalised with; None: leave it.

        Raises:
            UserError: if they are of another shape than the latents.
        """
        channels, height, width = self.latent_size
        shape = self.latent_size if self.reshape_to_2d else (height * width, channels)
        for tensor in (mean, std):
            if tensor is not None:
                _check_shape(tensor, shape, "the latents")
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_std", std, persistent=False)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> RAE:
        """Load a folder that ``save_pretrained`` or diffusers wrote, or a published autoencoder.

        Args:
            name: a folder, a hub id, or a published name such as ``rae-dinov2-b-256``.
            **options: see ``rae_xla.interop.pretrained.load_rae``.

        Raises:
            UserError: there is nothing of the kind, or it does not fit together.
        """
        from rae_xla.interop.pretrained import load_rae

        return load_rae(name, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder for ``from_pretrained``: config.json, weights, statistics, manifest.json.

        Raises:
            UserError: it is there already, or cannot be written.
        """
        from rae_xla.interop.pretrained import save_rae

        save_rae(self, folder)

    def _read_image_statistics(self, folder: str | Mapping[str, Any]) -> None:
        if is_meta(self) or isinstance(folder, Mapping):
            self.set_image_statistics([0.0] * 3, [1.0] * 3)
        else:
            self.set_image_statistics(*image_mean_std(folder))

    def _read_latent_statistics(self, path: str | None, eps: float) -> None:
        mean: Tensor | None = None
        std: Tensor | None = None
        if path is not None and is_meta(self):
            mean, std = torch.zeros(self.latent_size), torch.ones(self.latent_size)
        elif path is not None:
            mean, var = read_latent_statistics(path)
            std = torch.sqrt(var + eps)
            device = self.decoder.decoder_pos_embed.device
            mean, std = mean if mean is None else mean.to(device), std.to(device)
        try:
            self.set_latent_statistics(mean, std)
        except UserError as error:
            raise UserError(f"normalization_stat_path {path}: {error}") from None


def read_latent_statistics(path: str | Path) -> tuple[Tensor | None, Tensor]:
    """Read a statistics file (.pt, .safetensors): ``mean`` (None if it has none) and ``var``.

    Raises:
        UserError: if the file is missing, cannot be read, or has no usable ``var``.
    """
    values = read_weight_file(path, "normalization_stat_path")
    if not isinstance(values, Mapping) or not isinstance(values.get("var"), Tensor):
        raise UserError(
            f"normalization_stat_path: {path} has no `var` (a tensor with the variance of each "
            "latent element); `rae-xla stats` writes such a file"
        )
    mean, var = values.get("mean"), values["var"].float()
    if mean is not None and not isinstance(mean, Tensor):
        raise UserError(f"normalization_stat_path: `mean` in {path} is not a tensor")
    if not bool((var >= 0).all()):
        raise UserError(f"normalization_stat_path: `var` in {path} has negative or NaN values")
    return (None if mean is None else mean.float()), var


def _build_encoder(
    name: str, folder: str | Mapping[str, Any], input_size: int, params: dict[str, Any]
) -> FrozenEncoder:
    if name not in ENCODERS:
        raise UserError(
            f"unknown encoder_cls {name!r}{_nearest(name, ENCODERS)}; "
            f"choose one of {', '.join(ENCODERS)}"
        )
    encoder_cls = ENCODERS[name]
    known = list(inspect.signature(encoder_cls.__init__).parameters)[1:]
    for key in params:
        if key not in known:
            raise UserError(
                f"encoder_params: {name} has no {key!r}{_nearest(key, known)}; "
                f"it takes {', '.join(known)}"
            )
    path = known[0]  # each encoder's first argument is its folder
    return encoder_cls(**{path: folder, "input_size": input_size, **params})


def _load_decoder(decoder: ViTDecoder, path: str) -> None:
    what = "pretrained_decoder_path"
    if not Path(path).expanduser().is_file() and path.startswith("models/"):
        raise UserError(
            f"{what}: there is no file {path}; published weights are had with "
            f"`hf download {HUB_FILES} {path.removeprefix('models/')} --local-dir models`"
        )
    if Path(path).expanduser().is_dir():
        raise UserError(
            f"{what}: {path} is a folder; if it is a training checkpoint, `rae-xla export decoder "
            f"--ckpt {path} --out decoder.pt` takes the decoder out of it"
        )
    state = read_weight_file(path, what)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        kind = "a training checkpoint" if _is_checkpoint(state) else "not a state dict"
        raise UserError(
            f"{what}: {path} is {kind}; it must hold the decoder's weights alone: `rae-xla "
            f"export decoder --ckpt {path} --out decoder.pt` takes them out of the checkpoint; or "
            "give that as stage_1.ckpt"
        )
    if any(key.startswith("decoder.") for key in state):
        raise UserError(
            f"{what}: {path} holds a whole RAE (keys such as decoder.decoder_embed.weight); "
            "export the decoder first, or give the file as stage_1.ckpt"
        )
    load_strict(decoder, state, f"{what}: {path}")


def _is_checkpoint(state: Any) -> bool:
    return isinstance(state, Mapping) and bool({"model", "ema", "optimizer"} & state.keys())


def _check_shape(statistics: Tensor, shape: tuple[int, ...] | torch.Size, what: str) -> None:
    try:
        fits = torch.broadcast_shapes(statistics.shape, tuple(shape)) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise UserError(
            f"{what} have shape {tuple(shape)} but the latent statistics {tuple(statistics.shape)}"
        )


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
