"""Read and write folders of diffusers' ``AutoencoderRAE``.

diffusers 0.39 to 0.42 differs from the published model in two ways:

- Position table: its decoder scales positions to 16 cells per side on every grid. On a 16 x 16 grid
  this is the published table; on other grids the same weights decode to different images. The
  published repositories were converted from weights that were trained with the published table, so
  reading uses that one; ``as_diffusers`` uses diffusers' table.
- Second epsilon: it adds 1e-5 to a standard deviation that already contains an epsilon. The
  published repositories store the plain standard deviation, so reading takes it as it is;
  ``as_diffusers`` adds the second epsilon. Writing subtracts it first, so that diffusers computes
  the latents that we compute; the presence of a weights manifest tells a reader of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig, ViTMAEConfig

from rae_xla.errors import UserError
from rae_xla.models.decoder import DecoderConfig
from rae_xla.models.embeddings import sincos_positions
from rae_xla.models.hf_folder import DIFFUSERS_WEIGHT_FILES, read_json, read_weights
from rae_xla.models.pretrained.components import (
    RAEComponents,
    RAESettings,
    build_meta_encoder_and_decoder,
)
from rae_xla.models.pretrained.diffusers_keys import (
    ENCODER_TYPES,
    POSITIONS,
    diffusers_name,
    to_published_keys,
)
from rae_xla.models.pretrained.latent_statistics import invert_exactly
from rae_xla.models.weights import write_safetensors

SECOND_EPS = 1e-5
BASE_GRID = 16
# diffusers' encoder type -> configuration class of transformers, and values hard-coded in diffusers
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dinov2": (Dinov2WithRegistersConfig, {"image_size": 518}),
    "siglip2": (SiglipVisionConfig, {"image_size": 256}),
    "mae": (ViTMAEConfig, {"image_size": 224, "mask_ratio": 0.0}),
}
_ARCHITECTURE = (
    "hidden_size", "patch_size", "image_size", "num_attention_heads", "num_hidden_layers",
    "num_channels", "layer_norm_eps", "hidden_act", "qkv_bias", "mlp_ratio", "intermediate_size",
    "num_register_tokens", "use_swiglu_ffn",
)  # fmt: skip


def read_diffusers(
    folder: str | Path, *, as_diffusers: bool = False, second_eps_removed: bool = False
) -> RAEComponents:
    """Read a folder that ``AutoencoderRAE.save_pretrained`` or ``write_diffusers`` wrote.

    Args:
        folder: a local folder.
        as_diffusers: compute what diffusers computes, with its position table and second epsilon,
            rather than what the published weights were trained with.
        second_eps_removed: whether ``write_diffusers`` wrote the folder, which subtracts the second
            epsilon from the standard deviation.

    Raises:
        UserError: it is not such a folder, or keys do not fit; the message names all of them.
    """
    folder = Path(folder).absolute()
    values = read_json(str(folder), "config.json")
    if values is None or values.get("_class_name") != "AutoencoderRAE":
        raise UserError(
            f"{folder} is not a diffusers AutoencoderRAE: config.json has another _class_name"
        )
    settings = rae_settings(values, folder)
    tensors = read_weights(str(folder), DIFFUSERS_WEIGHT_FILES)
    encoder, decoder = build_meta_encoder_and_decoder(settings)
    keys = [f"encoder.{key}" for key in encoder.state_dict()]
    keys += [f"decoder.{key}" for key in decoder.state_dict()]
    state = to_published_keys(tensors, keys, values["encoder_type"], str(folder))
    table = diffusers_positions if as_diffusers else sincos_positions
    width = decoder.config.decoder_hidden_size
    grid = settings.encoder_input_size // encoder.patch_size
    state[POSITIONS] = table(width, grid, cls_token=True)[None]
    mean, std = _statistics(values, tensors, as_diffusers or second_eps_removed)
    return RAEComponents(settings, state, mean, std)


def write_diffusers(
    components: RAEComponents,
    folder: Path,
    *,
    transformers: int = 4,
    other_positions: bool = False,
) -> None:
    """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` of an ``AutoencoderRAE``.

    Args:
        components: the autoencoder.
        folder: exists.
        transformers: major version of transformers whose names the encoder's weights get: 4, as in
            the published repositories, or 5.
        other_positions: write the folder even if diffusers will use another position table.

    Raises:
        UserError: diffusers cannot represent this autoencoder; the message has the reason.
    """
    settings, state = components.settings, components.state
    settings.check_published_encoder("diffusers")
    encoder_type = {name: kind for kind, name in ENCODER_TYPES.items()}[settings.encoder_cls]
    if transformers == 5 and encoder_type == "siglip2":
        raise UserError(
            "diffusers (0.42) cannot build a SigLIP2 encoder with transformers 5: write the names "
            "of transformers 4, and load the folder with transformers 4"
        )
    _check_representable(settings, encoder_type)
    if not other_positions:
        _check_positions(state[POSITIONS])
    mean, std = _statistics_to_write(components)
    values = _config(settings, encoder_type, mean, std)
    tensors = {
        diffusers_name(name, encoder_type, transformers): tensor
        for name, tensor in state.items()
        if name != POSITIONS
    }
    tensors |= {
        "encoder_mean": torch.tensor(settings.image_mean).view(1, -1, 1, 1),
        "encoder_std": torch.tensor(settings.image_std).view(1, -1, 1, 1),
        "_latents_mean": mean,
        "_latents_std": std,
    }
    write_safetensors(tensors, folder / DIFFUSERS_WEIGHT_FILES[0])
    write_json(values, folder / "config.json")


def diffusers_positions(width: int, grid: int, cls_token: bool = True) -> Tensor:
    """Return diffusers' position table for a grid, (cls_token + grid², width) float32."""
    angles = torch.arange(grid, dtype=torch.float64) * BASE_GRID / grid
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def encode(positions: Tensor) -> Tensor:
        phase = positions.flatten()[:, None] * rates
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    rows, columns = torch.meshgrid(angles, angles, indexing="ij")
    table = torch.cat([encode(columns), encode(rows)], dim=1)
    extra = torch.zeros(int(cls_token), width, dtype=table.dtype)
    return torch.cat([extra, table]).float()


def rae_settings(values: Mapping[str, Any], folder: Path) -> RAESettings:
    """Convert the configuration of an ``AutoencoderRAE``.

    Args:
        values: content of its ``config.json``.
        folder: its folder, for error messages.

    Raises:
        UserError: it is not such a configuration.
    """
    try:
        encoder_type, width = values["encoder_type"], values["encoder_hidden_size"]
        config_class, fixed = _CONFIGS[encoder_type]
        encoder = config_class(
            hidden_size=width,
            patch_size=values["encoder_patch_size"],
            num_attention_heads=width // 64,
            num_hidden_layers=values["encoder_num_hidden_layers"],
            **fixed,
        )
        decoder = {
            "hidden_size": width,
            "patch_size": values["patch_size"],
            "num_channels": values.get("num_channels", 3),
            **{
                name: values[name]
                for name in (
                    "decoder_hidden_size",
                    "decoder_num_hidden_layers",
                    "decoder_num_attention_heads",
                    "decoder_intermediate_size",
                )
            },
        }
        return RAESettings(
            encoder_cls=ENCODER_TYPES[encoder_type],
            encoder_config=encoder.to_dict(),
            affine_norm=False,
            encoder_input_size=values["encoder_input_size"],
            image_mean=list(values.get("encoder_norm_mean") or (0.485, 0.456, 0.406)),
            image_std=list(values.get("encoder_norm_std") or (0.229, 0.224, 0.225)),
            decoder_config=decoder,
            noise_tau=float(values.get("noise_tau", 0.0)),
            reshape_to_2d=bool(values.get("reshape_to_2d", True)),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json is not that of an AutoencoderRAE: {type(error).__name__} {error}"
        ) from error


def _statistics(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], add_eps: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return mean (None: zero) and standard deviation (None: one) of the latents."""
    mean, std = tensors.get("_latents_mean"), tensors.get("_latents_std")
    if mean is None and values.get("latents_mean") is not None:
        mean = torch.tensor(values["latents_mean"])
    if std is None and values.get("latents_std") is not None:
        std = torch.tensor(values["latents_std"])
    mean = None if mean is None or (mean.numel() == 1 and not mean.any()) else mean.float()
    std = torch.ones(1) if std is None else std.float()
    std = (std + SECOND_EPS if add_eps else std) / float(values.get("scaling_factor") or 1.0)
    return mean, None if std.numel() == 1 and std.item() == 1 else std


def _statistics_to_write(components: RAEComponents) -> tuple[Tensor, Tensor]:
    """Return the mean, and the standard deviation minus the epsilon that diffusers will add."""
    mean, std = components.latent_mean, components.latent_std
    if std is None:
        std = torch.ones(1) if mean is None else torch.ones_like(mean)
    reduced = invert_exactly(lambda value: value + SECOND_EPS, std.double() - SECOND_EPS, std)
    return torch.zeros_like(reduced) if mean is None else mean, reduced


def _config(settings: RAESettings, encoder_type: str, mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    decoder, encoder = settings.decoder_config, settings.encoder_config
    return {
        "_class_name": "AutoencoderRAE",
        "_diffusers_version": "0.39.0",
        "encoder_type": encoder_type,
        "encoder_hidden_size": encoder["hidden_size"],
        "encoder_patch_size": encoder["patch_size"],
        "encoder_num_hidden_layers": encoder["num_hidden_layers"],
        "decoder_hidden_size": decoder["decoder_hidden_size"],
        "decoder_num_hidden_layers": decoder["decoder_num_hidden_layers"],
        "decoder_num_attention_heads": decoder["decoder_num_attention_heads"],
        "decoder_intermediate_size": decoder["decoder_intermediate_size"],
        "patch_size": decoder["patch_size"],
        "encoder_input_size": settings.encoder_input_size,
        "image_size": None,
        "num_channels": decoder["num_channels"],
        "encoder_norm_mean": settings.image_mean,
        "encoder_norm_std": settings.image_std,
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
        "noise_tau": settings.noise_tau,
        "reshape_to_2d": settings.reshape_to_2d,
        "use_encoder_loss": False,
        "scaling_factor": 1.0,
    }


def _check_representable(settings: RAESettings, encoder_type: str) -> None:
    """Raise if diffusers builds another architecture from its configuration keys."""
    if settings.affine_norm:
        raise UserError("diffusers drops the encoder's last affine map, which this encoder has")
    config_class, fixed = _CONFIGS[encoder_type]
    own = config_class.from_dict(dict(settings.encoder_config)).to_dict()
    theirs = config_class(
        hidden_size=own["hidden_size"],
        patch_size=own["patch_size"],
        num_attention_heads=own["hidden_size"] // 64,
        num_hidden_layers=own["num_hidden_layers"],
        **fixed,
    ).to_dict()
    default_decoder = DecoderConfig()
    differing = [
        f"the encoder's {key} is {own[key]}, diffusers builds {theirs[key]}"
        for key in _ARCHITECTURE
        if key in own and own[key] != theirs[key]
    ] + [
        f"the decoder's {key} is {settings.decoder_config[key]}, diffusers builds {value}"
        for key in ("hidden_act", "layer_norm_eps", "qkv_bias")
        if settings.decoder_config.get(key, value := getattr(default_decoder, key)) != value
    ]
    if differing:
        raise UserError(
            f"diffusers cannot represent this autoencoder: {'; '.join(differing)}. It builds only "
            "the published sizes; `rae-xla convert --to pretrained` writes any (docs/interop.md)"
        )


def _check_positions(table: Tensor) -> None:
    """Raise if diffusers' position table differs from a decoder's."""
    grid = int((table.shape[1] - 1) ** 0.5)
    theirs = diffusers_positions(table.shape[2], grid)[None]
    difference = (theirs - table.float()).abs().max().item()
    if difference > 1e-5:
        raise UserError(
            f"diffusers would decode different images with this autoencoder: on a grid of {grid} "
            f"x {grid} its position table differs from this decoder's by up to {difference:.2f} "
            f"(the tables agree on {BASE_GRID} x {BASE_GRID}), and the folder cannot store a "
            "table. To write it for readers that use the published table, give --other-positions "
            "(other_positions=True)"
        )


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n")
