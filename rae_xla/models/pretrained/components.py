"""The components of an RAE that files store: settings, state dict and latent statistics.

Reading and writing go through ``RAEComponents``, so that every file format needs one conversion.
This module does not import ``rae_xla.models.rae``, which inherits ``from_pretrained`` from this
package; the class to build is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.decoder import ViTDecoder
from rae_xla.models.encoders import ENCODERS, DINOv2Encoder, FrozenEncoder, encoder_name
from rae_xla.models.pretrained.latent_statistics import standard_deviation, variance_from_std
from rae_xla.models.weights import load_strict

PUBLISHED_ENCODERS = ("Dinov2withNorm", "SigLIP2wNorm", "MAEwNorm")
"""The encoder classes that the published layouts and diffusers know."""


class AutoencoderBase(nn.Module):
    """The attributes and methods of an RAE that this package uses.

    ``rae_xla.models.rae.RAE`` is the implementation and documents them.
    """

    encoder: FrozenEncoder
    decoder: ViTDecoder
    encoder_input_size: int
    noise_tau: float
    reshape_to_2d: bool
    decoder_output: str
    encoder_mean: Tensor
    encoder_std: Tensor
    latent_mean: Tensor | None
    latent_std: Tensor | None

    def set_image_statistics(self, mean: list[float], std: list[float]) -> None:
        """Set the per-channel mean and standard deviation of the encoder's images."""
        raise NotImplementedError

    def set_latent_statistics(self, mean: Tensor | None, std: Tensor | None) -> None:
        """Set the mean and standard deviation that normalise latents."""
        raise NotImplementedError


_Autoencoder = TypeVar("_Autoencoder", bound=AutoencoderBase)


@dataclass(frozen=True)
class RAESettings:
    """The settings that determine an RAE's architecture and preprocessing.

    Attributes:
        encoder_cls: name of the encoder class, a key of ``ENCODERS``.
        encoder_config: the encoder's configuration, as transformers writes it.
        affine_norm: whether the encoder's last norm has weights (DINOv2 with normalize=False).
        encoder_input_size: side in pixels that images are resized to for the encoder.
        image_mean: per-channel mean that the encoder's images are normalised with.
        image_std: per-channel standard deviation, likewise.
        decoder_config: fields of ``rae_xla.models.decoder.DecoderConfig``.
        noise_tau: strength of the latent noise in train mode.
        reshape_to_2d: whether latents are maps (C, h, w) rather than tokens (N, C).
        encoder_options: further keyword arguments of the encoder class.
        decoder_output: ``normalized`` or ``pixels``.

    Raises:
        UserError: the encoder class is not registered.
    """

    encoder_cls: str
    encoder_config: Mapping[str, Any]
    affine_norm: bool
    encoder_input_size: int
    image_mean: list[float]
    image_std: list[float]
    decoder_config: Mapping[str, Any]
    noise_tau: float
    reshape_to_2d: bool
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    decoder_output: str = "normalized"

    def __post_init__(self) -> None:
        if self.encoder_cls not in ENCODERS:
            raise UserError(
                f"the autoencoder has the encoder class {self.encoder_cls}, which is not one of "
                f"{', '.join(ENCODERS)}: register it in rae_xla.models.encoders.ENCODERS first"
            )

    @property
    def encoder_params(self) -> dict[str, Any]:
        """The encoder's keyword arguments beyond its configuration and input size."""
        is_dinov2 = ENCODERS[self.encoder_cls] is DINOv2Encoder
        affine = {"normalize": not self.affine_norm} if is_dinov2 else {}
        return affine | dict(self.encoder_options)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as ``config.json`` has them, without options that are not used."""
        values = asdict(self)
        if not values["encoder_options"]:
            del values["encoder_options"]
        if values["decoder_output"] == "normalized":
            del values["decoder_output"]
        return values

    def check_published_encoder(self, layout: str) -> None:
        """Raise ``UserError`` if a published layout cannot represent the encoder class."""
        if self.encoder_cls not in PUBLISHED_ENCODERS:
            raise UserError(
                f"the {layout} layout has no encoder class {self.encoder_cls}, only "
                f"{', '.join(PUBLISHED_ENCODERS)}: save the model with save_pretrained, or convert "
                "it with --to pretrained"
            )
        if self.encoder_options or self.decoder_output != "normalized":
            options = {**self.encoder_options, "decoder_output": self.decoder_output}
            raise UserError(
                f"the {layout} layout cannot represent the options of this autoencoder ({options}):"
                " save the model with save_pretrained, or convert it with --to pretrained"
            )


@dataclass(frozen=True)
class RAEComponents:
    """Everything needed to build an RAE.

    Attributes:
        settings: architecture and preprocessing.
        state: state dict with the published keys, on the CPU.
        latent_mean: mean of the latents, float32; None for zero.
        latent_std: standard deviation of the latents, float32; None for one.
    """

    settings: RAESettings
    state: Mapping[str, Tensor]
    latent_mean: Tensor | None
    latent_std: Tensor | None

    def with_statistics(self, mean: Tensor | None, var: Tensor) -> RAEComponents:
        """Return a copy with the latent statistics of a published file."""
        return replace(self, latent_mean=mean, latent_std=standard_deviation(var))

    def statistics(self) -> dict[str, Tensor]:
        """Return ``var`` and, if there is one, ``mean``, as a published statistics file has them.

        Raises:
            ValueError: these components have no latent statistics.
        """
        if self.latent_std is None:
            raise ValueError("the autoencoder has no latent statistics")
        values = {"var": variance_from_std(self.latent_std)}
        return values if self.latent_mean is None else {"mean": self.latent_mean, **values}


def rae_to_components(rae: AutoencoderBase) -> RAEComponents:
    """Return the components of an RAE. Tensors on the CPU are shared with it, not copied."""
    encoder = rae.encoder
    affine = isinstance(encoder, DINOv2Encoder) and any(
        "layernorm" in name for name in encoder.state_dict()
    )
    settings = RAESettings(
        encoder_cls=encoder_name(encoder),
        encoder_config=encoder.config,
        affine_norm=affine,
        encoder_input_size=rae.encoder_input_size,
        image_mean=rae.encoder_mean.flatten().tolist(),
        image_std=rae.encoder_std.flatten().tolist(),
        decoder_config=asdict(rae.decoder.config),
        noise_tau=rae.noise_tau,
        reshape_to_2d=rae.reshape_to_2d,
        encoder_options=_stored_options(encoder),
        decoder_output=rae.decoder_output,
    )
    state = {key: tensor.detach().cpu() for key, tensor in rae.state_dict().items()}
    return RAEComponents(settings, state, _on_cpu(rae.latent_mean), _on_cpu(rae.latent_std))


def _stored_options(encoder: FrozenEncoder) -> dict[str, Any]:
    """Return the options of an encoder that no other setting stores."""
    elsewhere = ("num_tokens",) if encoder_name(encoder) in PUBLISHED_ENCODERS else ()
    if isinstance(encoder, DINOv2Encoder):
        elsewhere = (*elsewhere, "normalize")
    return {key: value for key, value in encoder.options.items() if key not in elsewhere}


def build_rae(cls: type[_Autoencoder], components: RAEComponents, source: str) -> _Autoencoder:
    """Build an RAE in eval mode with float32 weights.

    Args:
        cls: ``rae_xla.models.rae.RAE``.
        components: what to build.
        source: the file or folder they come from, for error messages.

    Raises:
        UserError: weights or statistics do not fit the settings.
    """
    settings = components.settings
    with torch.device("meta"):
        rae = cls(
            encoder_cls=settings.encoder_cls,
            encoder_config_path=settings.encoder_config,
            encoder_input_size=settings.encoder_input_size,
            encoder_params=settings.encoder_params,
            decoder_config_path=settings.decoder_config,
            decoder_patch_size=settings.decoder_config["patch_size"],
            noise_tau=settings.noise_tau,
            reshape_to_2d=settings.reshape_to_2d,
            decoder_output=settings.decoder_output,
        )
    assign_float32(rae, components.state, source)
    _check_materialised(rae.encoder, source)
    rae.set_image_statistics(settings.image_mean, settings.image_std)
    try:
        rae.set_latent_statistics(components.latent_mean, components.latent_std)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return rae.eval()


def _check_materialised(encoder: FrozenEncoder, source: str) -> None:
    """Raise if a tensor of the encoder was not loaded, since the state dict does not contain it."""
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    if missing := [name for name, tensor in tensors if tensor.is_meta]:
        raise UserError(
            f"{source}: {', '.join(missing)} of {type(encoder).__name__} are not in its state dict "
            "and have no values: make them persistent buffers, or create them with device='cpu'"
        )


def build_meta_encoder_and_decoder(settings: RAESettings) -> tuple[FrozenEncoder, ViTDecoder]:
    """Build an RAE's encoder and decoder on the meta device: names and shapes without values."""
    encoder_cls: Any = ENCODERS[settings.encoder_cls]
    with torch.device("meta"):
        encoder: FrozenEncoder = encoder_cls(
            settings.encoder_config,
            input_size=settings.encoder_input_size,
            **settings.encoder_params,
        )
        decoder = ViTDecoder(
            settings.decoder_config,
            (settings.encoder_input_size // encoder.patch_size) ** 2,
            hidden_size=encoder.hidden_size,
            patch_size=settings.decoder_config["patch_size"],
        )
    return encoder, decoder


def assign_float32(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a module on the meta device, strictly and in float32.

    Raises:
        UserError: keys or shapes do not fit; ``source`` names the state dict in the message.
    """
    values = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    load_strict(module, values, source, assign=True)


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().cpu()
