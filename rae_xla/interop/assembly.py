"""An autoencoder taken apart into what files can hold, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.encoders import DINOv2Encoder, FrozenEncoder, MAEEncoder, SigLIP2Encoder
from rae_xla.models.rae import RAE
from rae_xla.models.weights import load_strict

ENCODER_NAMES: dict[type[FrozenEncoder], str] = {
    DINOv2Encoder: "Dinov2withNorm",
    SigLIP2Encoder: "SigLIP2wNorm",
    MAEEncoder: "MAEwNorm",
}
EPS = 1e-5  # added to the variance of latents before the square root


@dataclass(frozen=True)
class RAESettings:
    """How an autoencoder is built.

    Attributes:
        encoder_cls: the published name of its encoder.
        encoder_config: the encoder's configuration, as transformers writes it.
        affine_norm: whether the encoder's last norm has weights (a DINOv2 with normalize=False).
        image_mean: of the encoder's images, per channel; ``image_std`` likewise.
        decoder_config: see ``DecoderConfig``.
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


@dataclass(frozen=True)
class RAEContent:
    """An autoencoder: settings, state dict (published keys), latent statistics (None: without)."""

    settings: RAESettings
    state: Mapping[str, Tensor]
    latent_mean: Tensor | None
    latent_std: Tensor | None


def take_apart(rae: RAE) -> RAEContent:
    """What an autoencoder is made of; tensors are its own, on the CPU."""
    encoder = rae.encoder
    affine = isinstance(encoder, DINOv2Encoder) and any(
        "layernorm" in name for name in encoder.state_dict()
    )
    settings = RAESettings(
        encoder_cls=ENCODER_NAMES[type(encoder)],
        encoder_config=encoder.config,
        affine_norm=affine,
        encoder_input_size=rae.encoder_input_size,
        image_mean=rae.encoder_mean.flatten().tolist(),
        image_std=rae.encoder_std.flatten().tolist(),
        decoder_config=asdict(rae.decoder.config),
        noise_tau=rae.noise_tau,
        reshape_to_2d=rae.reshape_to_2d,
    )
    state = {key: tensor.detach().cpu() for key, tensor in rae.state_dict().items()}
    return RAEContent(settings, state, _host(rae.latent_mean), _host(rae.latent_std))


def outline(settings: RAESettings) -> RAE:
    """The autoencoder on the meta device: shapes without values."""
    params: dict[str, Any] = {}
    if settings.encoder_cls == ENCODER_NAMES[DINOv2Encoder]:
        params["normalize"] = not settings.affine_norm
    with torch.device("meta"):
        return RAE(
            encoder_cls=settings.encoder_cls,
            encoder_config_path=settings.encoder_config,
            encoder_input_size=settings.encoder_input_size,
            encoder_params=params,
            decoder_config_path=settings.decoder_config,
            decoder_patch_size=settings.decoder_config["patch_size"],
            noise_tau=settings.noise_tau,
            reshape_to_2d=settings.reshape_to_2d,
        )


def put_together(content: RAEContent, where: str) -> RAE:
    """Build the autoencoder, in eval mode, with float32 weights.

    Raises:
        UserError: weights or statistics do not fit; ``where`` names them in the message.
    """
    rae = outline(content.settings)
    fill(rae, content.state, where)
    rae.set_image_statistics(content.settings.image_mean, content.settings.image_std)
    try:
        rae.set_latent_statistics(content.latent_mean, content.latent_std)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return rae.eval()


def fill(module: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give a module that was built on the meta device its weights, in float32, strictly.

    Raises:
        UserError: naming the keys that do not fit.
    """
    load_strict(
        module,
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()},
        where,
        assign=True,
    )


def with_statistics(content: RAEContent, mean: Tensor | None, var: Tensor) -> RAEContent:
    """The same autoencoder with the statistics of a published file."""
    return replace(content, latent_mean=mean, latent_std=torch.sqrt(var + EPS))


def variance_of(std: Tensor) -> Tensor:
    """The variance whose ``sqrt(var + EPS)`` is ``std`` to the last bit.

    Squaring back alone misses it by a unit in the last place here and there.
    """
    target = std.float()
    return solve(lambda var: torch.sqrt(var + EPS), target.double().square().sub(EPS), target)


def solve(forward: Any, guess: Tensor, target: Tensor) -> Tensor:
    """Move float32 values by units in the last place until ``forward`` gives ``target``.

    Args:
        forward: increasing, element by element.
        guess: near the answer.
        target: values that ``forward`` takes.
    """
    found = guess.float()
    for _ in range(32):
        error = target - forward(found)
        if not error.any():
            break
        towards = torch.where(error > 0, torch.inf, -torch.inf)
        found = torch.where(error == 0, found, torch.nextafter(found, towards))
    return found


def _host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().cpu()
