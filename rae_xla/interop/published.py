"""The published models: which repositories and files they are, and how each is configured.

Zheng et al. 2025, hub collection ``nyu-visionx/RAE-collections``; ``configs/sampling`` and
``configs/stage1/pretrained`` say the same in YAML, and a test holds the two together. In a
configuration a file of the collection is ``models/<its path there>``, as in everybody's YAML files;
``fetch`` puts a downloaded file in its place where there is none.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rae_xla.errors import UserError
from rae_xla.interop.hub import pull, pull_files
from rae_xla.models.hf_folder import is_hub_id

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

COLLECTION = "nyu-visionx/RAE-collections"
LOCAL = "models/"
ENCODER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
DISCRIMINATOR = "discs/dino_vit_small_patch8_224.pth"

DIFFUSERS = {
    "rae-dinov2-s-256": "nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08",
    "rae-dinov2-b-256": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
    "rae-dinov2-b-512": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512",
    "rae-dinov2-l-256": "nyu-visionx/RAE-dinov2-wReg-large-ViTXL-n08",
    "rae-siglip2-b-256": "nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08",
    "rae-mae-b-256": "nyu-visionx/RAE-mae-base-p16-ViTXL-n08",
}
"""Autoencoders in diffusers' layout (``AutoencoderRAE``), by our short names."""

# configs/decoder/ViTXL/config.json, as far as it concerns a decoder
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
    """A published RAE with a ViT-XL decoder; files by their paths in the collection."""

    encoder_cls: str
    encoder: str
    input_size: int
    grid: int
    decoder: str
    statistics: str

    def section(self) -> dict[str, Any]:
        """``stage_1`` of a configuration."""
        if self.encoder_cls == "Dinov2withNorm":
            encoder_params: dict[str, Any] = {"dinov2_path": self.encoder, "normalize": True}
        else:
            encoder_params = {"model_name": self.encoder}
        params = {
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
        return {"target": "stage1.RAE", "params": params}


_DINOV2 = ("Dinov2withNorm", "facebook/dinov2-with-registers-base")

AUTOENCODERS = {
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
    """A published DiT-DH: its size (``S`` or ``XL``), and its file in the collection."""

    size: str
    file: str

    def section(self, grid: int) -> dict[str, Any]:
        """``stage_2`` of a configuration, for latents of ``grid`` x ``grid`` cells."""
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
    """What draws pictures of the 1,000 ImageNet classes: a DiT-DH in an autoencoder's latents.

    Attributes:
        guide: the weaker model of autoguidance, with the published ``scale``; None: without.
    """

    about: str
    autoencoder: str
    denoiser: Denoiser
    guide: Denoiser | None = None
    scale: float = 1.0

    def tree(self) -> dict[str, Any]:
        """Its configuration, as a YAML file would hold it."""
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
            "stage_2": self.denoiser.section(rae.grid),
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

GENERATORS = {
    "ditdh-xl-256": Generator("DiT-DH-XL, 256 px", "rae-dinov2-b-256", _XL_256),
    "ditdh-xl-256-autoguidance": Generator(
        "the same, guided by DiT-DH-S of epoch 14", "rae-dinov2-b-256", _XL_256, _S_256, 1.42
    ),
    "ditdh-xl-512": Generator("DiT-DH-XL, 512 px", "rae-dinov2-b-512", _XL_512),
    "ditdh-xl-512-autoguidance": Generator(
        "the same, guided by DiT-DH-S of epoch 20", "rae-dinov2-b-512", _XL_512, _S_512, 1.5
    ),
    "ditdh-s-256": Generator("the 256 px guide alone: DiT-DH-S", "rae-dinov2-b-256", _S_256),
    "ditdh-s-512": Generator("the 512 px guide alone: DiT-DH-S", "rae-dinov2-b-512", _S_512),
}


def files_of(name: str) -> dict[str, list[str]]:
    """What a published model is made of: repository -> paths of files in it.

    Args:
        name: of a generator or an autoencoder; or ``discriminator``, the frozen network of stage
            1's GAN loss.

    Raises:
        UserError: there is no such name; the nearest is given.
    """
    if name == "discriminator":
        return {COLLECTION: [DISCRIMINATOR]}
    if name in AUTOENCODERS:
        rae, files = AUTOENCODERS[name], []
    elif name in GENERATORS:
        generator = GENERATORS[name]
        rae = AUTOENCODERS[generator.autoencoder]
        files = [generator.denoiser.file, *([generator.guide.file] if generator.guide else [])]
    else:
        raise UserError(f"{name} is no published model: {nearest(name)}")
    return {COLLECTION: [rae.decoder, rae.statistics, *files], rae.encoder: list(ENCODER_FILES)}


def names() -> list[str]:
    """All names that ``files_of`` knows."""
    return [*GENERATORS, *AUTOENCODERS, "discriminator"]


def nearest(name: str, among: Sequence[str] | None = None) -> str:
    """``did you mean ...?``, or what there is."""
    known = list(names() if among is None else among)
    near = difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


def published_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a published generator; its files need not be here.

    Raises:
        UserError: no such name, or an override that does not fit.
    """
    from rae_xla.config import load_config

    if name not in GENERATORS:
        raise UserError(f"{name} is no published generator: {nearest(name, list(GENERATORS))}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(GENERATORS[name].tree()), encoding="utf-8")
        return load_config(path, overrides)


def fetch(config: RunConfig) -> RunConfig:
    """Download the published files and the encoder a configuration names, unless they are here.

    Returns:
        The configuration with the downloaded files' paths. A file that exists is left as it is, and
        so is one that was never published: loading it will say what is wrong.

    Raises:
        UserError: something could not be had from the hub.
    """
    published = {path for name in names() for path in files_of(name).get(COLLECTION, [])}
    spec = config.guidance.guidance_model
    autoencoder = config.stage_1.params if config.stage_1 else {}
    said = [
        autoencoder.get("pretrained_decoder_path"),
        autoencoder.get("normalization_stat_path"),
        *(model.ckpt for model in (config.stage_2, spec) if model is not None),
    ]
    absent = [
        path.removeprefix(LOCAL)
        for path in said
        if path and path.startswith(LOCAL) and not Path(path).exists()
    ]
    wanted = list(dict.fromkeys(path for path in absent if path in published))
    had = pull_files(COLLECTION, wanted) if wanted else {}
    places: dict[str, str] = {LOCAL + path: str(place) for path, place in had.items()}
    for encoder in _hub_encoders(autoencoder):
        places[encoder] = str(_encoder_folder(encoder))
    if config.stage_1 is not None:
        config = replace(
            config, stage_1=replace(config.stage_1, params=_replaced(autoencoder, places))
        )
    if config.stage_2 is not None and config.stage_2.ckpt in places:
        stage_2 = replace(config.stage_2, ckpt=places[config.stage_2.ckpt])
        config = replace(config, stage_2=stage_2)
    if spec is not None and spec.ckpt in places:
        guide = replace(spec, ckpt=places[spec.ckpt])
        config = replace(config, guidance=replace(config.guidance, guidance_model=guide))
    return config


def _hub_encoders(params: Mapping[str, Any]) -> list[str]:
    """The hub ids among the folders an autoencoder reads its encoder from."""
    inner = params.get("encoder_params") or {}
    said = [params.get("encoder_config_path"), inner.get("dinov2_path"), inner.get("model_name")]
    return list(dict.fromkeys(s for s in said if isinstance(s, str) and is_hub_id(s)))


def _encoder_folder(encoder: str) -> Path:
    published = {rae.encoder for rae in AUTOENCODERS.values()}
    if encoder in published:
        files = pull_files(encoder, ENCODER_FILES)
        return files["config.json"].parent
    return pull(encoder, ["*.json", "*.safetensors", "*.bin"]).folder


def _replaced(params: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """``params`` with every string that ``places`` knows replaced."""
    changed: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            changed[key] = _replaced(value, places)
        else:
            changed[key] = places.get(value, value) if isinstance(value, str) else value
    return changed
