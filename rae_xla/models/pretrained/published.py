"""Published models: their repositories, files and constructor arguments.

Zheng et al. 2025, hub collection ``nyu-visionx/RAE-collections``; ``configs/sampling`` and
``configs/stage1/pretrained`` hold the same in YAML, and a test compares the two. A configuration
refers to a file of the collection as ``models/<path in the collection>``, as published YAML files
do; ``fetch_files`` downloads a file that does not exist there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.pretrained.hub import pull, pull_files
from rae_xla.models.pretrained.published_raev2 import (
    RAEv2Autoencoder,
    RAEv2Generator,
    raev2_models,
)
from rae_xla.models.pretrained.published_text_to_image import TEXT_TO_IMAGE
from rae_xla.models.pretrained.raev2_files import REPOSITORY as RAEV2_REPOSITORY

COLLECTION = "nyu-visionx/RAE-collections"
LOCAL = "models/"
"""Prefix of a published file's path in a configuration."""
ENCODER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
RAE_FILES = ("pretrained_decoder_path", "normalization_stat_path")
"""The constructor arguments of an RAE that may name a published file."""
DISCRIMINATOR = "discs/dino_vit_small_patch8_224.pth"

DIFFUSERS = {
    "rae-dinov2-s-256": "nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08",
    "rae-dinov2-b-256": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
    "rae-dinov2-b-512": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512",
    "rae-dinov2-l-256": "nyu-visionx/RAE-dinov2-wReg-large-ViTXL-n08",
    "rae-siglip2-b-256": "nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08",
    "rae-mae-b-256": "nyu-visionx/RAE-mae-base-p16-ViTXL-n08",
}
"""Short name -> repository of an autoencoder in diffusers' layout (``AutoencoderRAE``)."""

# The decoder's keys of configs/decoder/ViTXL/config.json.
_VIT_XL = {
    "decoder_hidden_size": 1152,
    "decoder_num_hidden_layers": 28,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 4096,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}


@dataclass(frozen=True)
class Autoencoder:
    """A published RAE with a ViT-XL decoder.

    Attributes:
        encoder_cls: published name of the encoder class.
        encoder: hub id of the encoder.
        input_size: side in pixels of the encoder's images.
        grid: side of the latents.
        decoder: path of the decoder's weights in the collection.
        statistics: path of the latent statistics in the collection.
        repository: hub id of the collection.
    """

    encoder_cls: str
    encoder: str
    input_size: int
    grid: int
    decoder: str
    statistics: str
    repository: str = COLLECTION

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of the RAE."""
        if self.encoder_cls == "Dinov2withNorm":
            encoder_params: dict[str, Any] = {"dinov2_path": self.encoder, "normalize": True}
        else:
            encoder_params = {"model_name": self.encoder}
        return {
            "encoder_cls": self.encoder_cls,
            "encoder_config_path": self.encoder,
            "encoder_input_size": self.input_size,
            "encoder_params": encoder_params,
            "decoder_config_path": _VIT_XL,
            "pretrained_decoder_path": LOCAL + self.decoder,
            "noise_tau": 0.0,
            "reshape_to_2d": True,
            "normalization_stat_path": LOCAL + self.statistics,
        }

    def section(self) -> dict[str, Any]:
        """Return the ``stage_1`` section of a configuration."""
        return {"target": "stage1.RAE", "params": self.arguments()}


_DINOV2 = ("Dinov2withNorm", "facebook/dinov2-with-registers-base")

AUTOENCODERS: dict[str, Autoencoder | RAEv2Autoencoder] = {
    "rae-dinov2-b-256": Autoencoder(
        *_DINOV2,
        224,
        16,
        "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt",
    ),
    "rae-dinov2-b-512": Autoencoder(
        *_DINOV2,
        448,
        32,
        "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        "stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
    ),
    "rae-siglip2-b-256": Autoencoder(
        "SigLIP2wNorm",
        "google/siglip2-base-patch16-256",
        256,
        16,
        "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
        "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt",
    ),
    "rae-mae-b-256": Autoencoder(
        "MAEwNorm",
        "facebook/vit-mae-base",
        256,
        16,
        "decoders/mae/base_p16/ViTXL_n08/model.pt",
        "stats/mae/base_p16/ImageNet1k/stat.pt",
    ),
}


@dataclass(frozen=True)
class Denoiser:
    """A published DiT-DH.

    Attributes:
        size: ``S`` or ``XL``.
        file: path of its weights in the collection.
    """

    size: str
    file: str

    def section(self, grid: int) -> dict[str, Any]:
        """Return the ``stage_2`` section of a configuration for latents of ``grid`` x ``grid``."""
        width, depth, heads = {"S": (384, 12, 6), "XL": (1152, 28, 16)}[self.size]
        params = {
            "input_size": grid,
            "patch_size": 1,
            "in_channels": 768,
            "hidden_size": [width, 2048],
            "depth": [depth, 2],
            "num_heads": [heads, 16],
            "mlp_ratio": 4.0,
            "class_dropout_prob": 0.1,
            "num_classes": 1000,
            "use_qknorm": False,
            "use_swiglu": True,
            "use_rope": True,
            "use_rmsnorm": True,
            "wo_shift": False,
            "use_pos_embed": True,
        }
        return {
            "target": "stage2.models.DDT.DiTwDDTHead",
            "params": params,
            "ckpt": LOCAL + self.file,
        }


@dataclass(frozen=True)
class Generator:
    """A published class-conditional generator (1,000 ImageNet classes): an RAE and a DiT-DH.

    Attributes:
        about: one line for ``rae-xla hub list``.
        autoencoder: key of ``AUTOENCODERS``.
        denoiser: the DiT-DH.
        guide: the weaker DiT-DH of autoguidance; None: no guidance.
        scale: published scale of autoguidance.
    """

    about: str
    autoencoder: str
    denoiser: Denoiser
    guide: Denoiser | None = None
    scale: float = 1.0

    def stage_2(self) -> dict[str, Any]:
        """Return the ``stage_2`` section of its configuration."""
        return self.denoiser.section(AUTOENCODERS[self.autoencoder].grid)

    def tree(self) -> dict[str, Any]:
        """Return its configuration as the content of a YAML file."""
        rae = AUTOENCODERS[self.autoencoder]
        guidance: dict[str, Any] = {"method": "cfg", "scale": 1.0}
        if self.guide is not None:
            guidance = {
                "method": "autoguidance",
                "scale": self.scale,
                "guidance_model": self.guide.section(rae.grid),
            }
        dimension = 768 * rae.grid**2
        return {
            "stage_1": rae.section(),
            "stage_2": self.stage_2(),
            "transport": {"params": {"time_dist_type": "logit-normal_0_1"}},
            "sampler": {"mode": "ODE", "params": {"sampling_method": "euler", "num_steps": 50}},
            "guidance": guidance,
            "misc": {"time_dist_shift_dim": dimension, "time_dist_shift_base": 4096},
        }


_DITS = "DiTs/Dinov2/wReg_base/"
_XL_256 = Denoiser("XL", _DITS + "ImageNet256/DiTDH-XL/stage2_model.pt")
_XL_512 = Denoiser("XL", _DITS + "ImageNet512/DiTDH-XL_ep400/stage2_model.pt")
_S_256 = Denoiser("S", _DITS + "ImageNet256/DiTDH-S_ep14/stage2_model.pt")
_S_512 = Denoiser("S", _DITS + "ImageNet512/DiTDH-S_ep20/stage2_model.pt")

GENERATORS: dict[str, Generator | RAEv2Generator] = {
    "ditdh-xl-256": Generator("DiT-DH-XL, 256 px", "rae-dinov2-b-256", _XL_256),
    "ditdh-xl-256-autoguidance": Generator(
        "DiT-DH-XL, 256 px, autoguidance by DiT-DH-S", "rae-dinov2-b-256", _XL_256, _S_256, 1.42
    ),
    "ditdh-xl-512": Generator("DiT-DH-XL, 512 px", "rae-dinov2-b-512", _XL_512),
    "ditdh-xl-512-autoguidance": Generator(
        "DiT-DH-XL, 512 px, autoguidance by DiT-DH-S", "rae-dinov2-b-512", _XL_512, _S_512, 1.5
    ),
    "ditdh-s-256": Generator("DiT-DH-S, 256 px: the guide alone", "rae-dinov2-b-256", _S_256),
    "ditdh-s-512": Generator("DiT-DH-S, 512 px: the guide alone", "rae-dinov2-b-512", _S_512),
}

_RAEV2_AUTOENCODERS, _RAEV2_GENERATORS = raev2_models(_VIT_XL)
AUTOENCODERS |= _RAEV2_AUTOENCODERS
GENERATORS |= _RAEV2_GENERATORS


def published_files(name: str) -> dict[str, list[str]]:
    """Return the files of a published model: repository -> paths in it, or patterns of them.

    Args:
        name: key of ``GENERATORS``, ``TEXT_TO_IMAGE`` or ``AUTOENCODERS``; or ``discriminator``,
            the frozen backbone of the stage-1 GAN loss.

    Raises:
        UserError: the name is unknown; the message suggests similar ones.
    """
    if name == "discriminator":
        return {COLLECTION: [DISCRIMINATOR]}
    if name in TEXT_TO_IMAGE:
        return TEXT_TO_IMAGE[name].files()
    if name in AUTOENCODERS:
        rae, files = AUTOENCODERS[name], []
    elif name in GENERATORS:
        generator = GENERATORS[name]
        rae = AUTOENCODERS[generator.autoencoder]
        files = [generator.denoiser.file, *([generator.guide.file] if generator.guide else [])]
    else:
        raise UserError(f"{name} is not a published model: {suggest_name(name)}")
    return {rae.repository: [rae.decoder, rae.statistics, *files], rae.encoder: list(ENCODER_FILES)}


def published_names() -> list[str]:
    """Return all names that ``published_files`` accepts."""
    return [*GENERATORS, *TEXT_TO_IMAGE, *AUTOENCODERS, "discriminator"]


def suggest_name(name: str, known: Sequence[str] | None = None) -> str:
    """Return ``did you mean ...?`` with similar names, or the list of known names."""
    candidates = list(published_names() if known is None else known)
    similar = difflib.get_close_matches(name, candidates, n=2)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"the published names are {', '.join(candidates)}"


def fetch_files(paths: Iterable[str | None]) -> dict[str, str]:
    """Download published files that a configuration names and that do not exist locally.

    Args:
        paths: paths as a configuration has them; None, existing files and files that were never
            published are skipped (loading the latter reports what is wrong).

    Returns:
        Path in the configuration -> path of the downloaded file.

    Raises:
        UserError: a file cannot be downloaded.
    """
    repositories = {
        path: repository
        for name in published_names()
        for repository, files in published_files(name).items()
        if repository in (COLLECTION, RAEV2_REPOSITORY)
        for path in files
    }
    missing = [
        path.removeprefix(LOCAL)
        for path in paths
        if path and path.startswith(LOCAL) and not Path(path).exists()
    ]
    fetched: dict[str, str] = {}
    for repository in dict.fromkeys(repositories.values()):
        wanted = [path for path in dict.fromkeys(missing) if repositories.get(path) == repository]
        files = pull_files(repository, wanted) if wanted else {}
        fetched |= {LOCAL + path: str(file) for path, file in files.items()}
    return fetched


def fetch_encoders(params: Mapping[str, Any]) -> dict[str, str]:
    """Download the encoder that an RAE's constructor arguments name by hub id.

    Returns:
        Hub id -> folder of the downloaded encoder.

    Raises:
        UserError: an encoder cannot be downloaded.
    """
    inner = params.get("encoder_params") or {}
    names = (params.get("encoder_config_path"), inner.get("dinov2_path"), inner.get("model_name"))
    encoders = dict.fromkeys(n for n in names if isinstance(n, str) and is_hub_id(n))
    return {encoder: str(_encoder_folder(encoder)) for encoder in encoders}


def fetch_rae(params: Mapping[str, Any]) -> dict[str, Any]:
    """Download what an RAE's constructor arguments name; return the arguments with local paths.

    Raises:
        UserError: something cannot be downloaded.
    """
    files = fetch_files(params.get(key) for key in RAE_FILES)
    return replace_paths(params, files | fetch_encoders(params))


def replace_paths(params: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Return constructor arguments with every string that is a key of ``paths`` replaced."""
    return {
        key: replace_paths(value, paths)
        if isinstance(value, Mapping)
        else (paths.get(value, value) if isinstance(value, str) else value)
        for key, value in params.items()
    }


def _encoder_folder(encoder: str) -> Path:
    if encoder in {rae.encoder for rae in AUTOENCODERS.values()}:
        return pull_files(encoder, ENCODER_FILES)["config.json"].parent
    return pull(encoder, ["*.json", "*.safetensors", "*.bin"]).folder
