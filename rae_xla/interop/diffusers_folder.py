"""A diffusers ``AutoencoderRAE`` folder, read and written.

Two things are not the same there (seen in diffusers 0.39 to 0.42):

- Its decoder's position table counts 16 cells across whatever the grid is. On a grid of 16 x 16
  that is the published table; on any other the same weights decode to other images. The
  repositories converted from the published weights were trained with the published table, which is
  what reading gives; ``as_diffusers`` gives diffusers' own.
- It adds 1e-5 to a standard deviation that already has an epsilon inside. Repositories hold the
  plain standard deviation, which is what reading takes; ``as_diffusers`` adds theirs. Writing takes
  it off first, so that diffusers computes our latents, and says so in the manifest.
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
from rae_xla.interop.assembly import RAEContent, RAESettings, outline, solve
from rae_xla.interop.diffusers_keys import (
    ENCODER_TYPES,
    POSITIONS,
    diffusers_name,
    published_state,
)
from rae_xla.models.embeddings import sincos_positions
from rae_xla.models.hf_folder import DIFFUSERS_WEIGHT_FILES, read_json, read_weights
from rae_xla.models.vit_decoder import DecoderConfig
from rae_xla.models.weights import write_safetensors

SECOND_EPS = 1e-5
BASE_GRID = 16
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {  # what diffusers fixes
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
    folder: str | Path, *, as_diffusers: bool = False, second_eps_taken_off: bool = False
) -> RAEContent:
    """Read a folder that ``AutoencoderRAE.save_pretrained`` or ``write_diffusers`` wrote.

    Args:
        folder: a local folder.
        as_diffusers: compute what diffusers computes, its position table and second epsilon
            included, rather than what the published weights were trained with.
        second_eps_taken_off: its standard deviation lacks the second epsilon, as ours do.

    Raises:
        UserError: it is not such a folder, or keys do not fit; all are named.
    """
    folder = Path(folder).absolute()
    values = read_json(str(folder), "config.json")
    if values is None or values.get("_class_name") != "AutoencoderRAE":
        raise UserError(f"{folder} is no diffusers AutoencoderRAE: its config.json does not say so")
    settings = rae_settings(values, folder)
    tensors = read_weights(str(folder), DIFFUSERS_WEIGHT_FILES)
    rae = outline(settings)
    state = published_state(tensors, rae.state_dict(), values["encoder_type"], str(folder))
    table = diffusers_positions if as_diffusers else sincos_positions
    width = rae.decoder.config.decoder_hidden_size
    state[POSITIONS] = table(width, rae.grid, cls_token=True)[None]
    mean, std = _statistics(values, tensors, as_diffusers or second_eps_taken_off)
    return RAEContent(settings, state, mean, std)


def write_diffusers(
    content: RAEContent, folder: Path, *, transformers: int = 4, other_positions: bool = False
) -> None:
    """Write what ``AutoencoderRAE.from_pretrained`` reads, into a folder that exists.

    Args:
        content: the autoencoder.
        folder: gets ``config.json`` and ``diffusion_pytorch_model.safetensors``.
        transformers: the release whose names the encoder's weights get: 4, as in the published
            repositories, or 5.
        other_positions: write it although diffusers will decode with another position table.

    Raises:
        UserError: diffusers cannot express this autoencoder; the message says why.
    """
    settings, state = content.settings, content.state
    encoder_type = {name: kind for kind, name in ENCODER_TYPES.items()}[settings.encoder_cls]
    if transformers == 5 and encoder_type == "siglip2":
        raise UserError(
            "diffusers (0.42) cannot build a SigLIP2 encoder with transformers 5: write the names "
            "of transformers 4, and load the folder beside that"
        )
    _check_expressible(content, encoder_type)
    if not other_positions:
        _check_positions(state[POSITIONS])
    values = _config(content, encoder_type)
    mean, std = _their_statistics(content)
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
    """diffusers' table for a grid: (1 + grid², width), the class token's row first."""
    angles = torch.arange(grid, dtype=torch.float64) * BASE_GRID / grid
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def along(positions: Tensor) -> Tensor:
        phase = positions.flatten()[:, None] * rates
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    rows, columns = torch.meshgrid(angles, angles, indexing="ij")
    table = torch.cat([along(columns), along(rows)], dim=1)
    extra = torch.zeros(int(cls_token), width, dtype=table.dtype)
    return torch.cat([extra, table]).float()


def rae_settings(values: Mapping[str, Any], folder: Path) -> RAESettings:
    """How the autoencoder of an ``AutoencoderRAE`` configuration is built here.

    Raises:
        UserError: the configuration is not one; ``folder`` is where it was.
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
            f"{folder}/config.json is not an AutoencoderRAE's: {type(error).__name__} {error}"
        ) from error


def _statistics(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], add_eps: bool
) -> tuple[Tensor | None, Tensor | None]:
    mean, std = tensors.get("_latents_mean"), tensors.get("_latents_std")
    if mean is None and values.get("latents_mean") is not None:
        mean = torch.tensor(values["latents_mean"])
    if std is None and values.get("latents_std") is not None:
        std = torch.tensor(values["latents_std"])
    mean = None if mean is None or (mean.numel() == 1 and not mean.any()) else mean.float()
    std = torch.ones(1) if std is None else std.float()
    std = (std + SECOND_EPS if add_eps else std) / float(values.get("scaling_factor") or 1.0)
    return mean, None if std.numel() == 1 and std.item() == 1 else std


def _their_statistics(content: RAEContent) -> tuple[Tensor, Tensor]:
    """Mean, and the standard deviation without the epsilon that diffusers will add."""
    mean, std = content.latent_mean, content.latent_std
    if std is None:
        std = torch.ones(1) if mean is None else torch.ones_like(mean)
    theirs = solve(lambda value: value + SECOND_EPS, std.double() - SECOND_EPS, std)
    return torch.zeros_like(theirs) if mean is None else mean, theirs


def _config(content: RAEContent, encoder_type: str) -> dict[str, Any]:
    settings = content.settings
    decoder, encoder = settings.decoder_config, settings.encoder_config
    mean, std = _their_statistics(content)
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


def _check_expressible(content: RAEContent, encoder_type: str) -> None:
    settings = content.settings
    if settings.affine_norm:
        raise UserError("diffusers drops the encoder's last affine map, which this one keeps")
    config_class, fixed = _CONFIGS[encoder_type]
    own = config_class.from_dict(dict(settings.encoder_config)).to_dict()
    theirs = config_class(
        hidden_size=own["hidden_size"],
        patch_size=own["patch_size"],
        num_attention_heads=own["hidden_size"] // 64,
        num_hidden_layers=own["num_hidden_layers"],
        **fixed,
    ).to_dict()
    theirs_decoder = DecoderConfig()
    differing = [
        f"the encoder's {key} is {own[key]}, diffusers builds {theirs[key]}"
        for key in _ARCHITECTURE
        if key in own and own[key] != theirs[key]
    ] + [
        f"the decoder's {key} is {settings.decoder_config[key]}, diffusers builds {value}"
        for key in ("hidden_act", "layer_norm_eps", "qkv_bias")
        if settings.decoder_config.get(key, value := getattr(theirs_decoder, key)) != value
    ]
    if differing:
        raise UserError(
            f"diffusers cannot express this autoencoder: {'; '.join(differing)}. It builds the "
            "published sizes alone; `rae-xla convert --to pretrained` writes any (docs/interop.md)"
        )


def _check_positions(table: Tensor) -> None:
    grid = int((table.shape[1] - 1) ** 0.5)
    theirs = diffusers_positions(table.shape[2], grid)[None]
    difference = (theirs - table.float()).abs().max().item()
    if difference > 1e-5:
        raise UserError(
            f"diffusers would decode this autoencoder to other images: on a grid of {grid} x "
            f"{grid} its position table differs from this decoder's by up to {difference:.2f} "
            f"(they agree on {BASE_GRID} x {BASE_GRID}), and it cannot be stored. To write the "
            "folder all the same, for readers that have the published table, ask for it "
            "(other_positions, --other-positions)"
        )


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n")
