"""An autoencoder as the files that a published YAML names: encoder folder, decoder, statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rae_xla.interop import fingerprint as prints
from rae_xla.interop.assembly import RAEContent
from rae_xla.interop.belonging import write_beside
from rae_xla.interop.diffusers_folder import write_json
from rae_xla.interop.manifest import Manifest
from rae_xla.interop.pretrained import statistics_of
from rae_xla.models.weights import write_safetensors, write_torch_file

DECODER_FILE, STATISTICS_FILE, SECTION = "decoder.pt", "stat.pt", "stage_1.yaml"


def write_published(content: RAEContent, manifest: Manifest, folder: Path, final: Path) -> None:
    """Write ``encoder/``, ``decoder_config/``, ``decoder.pt``, ``stat.pt`` and ``stage_1.yaml``.

    Args:
        content: the autoencoder.
        manifest: of its parts; each file gets its own.
        folder: exists.
        final: the name the folder will have, for the paths in ``stage_1.yaml``.
    """
    settings = content.settings
    encoder = folder / "encoder"
    encoder.mkdir()
    trunk = next(k for k in content.state if k.startswith("encoder.")).split(".")[1]
    write_safetensors(
        prints.under(content.state, f"encoder.{trunk}"), encoder / "model.safetensors"
    )
    write_json(settings.encoder_config, encoder / "config.json")
    side = {"height": settings.encoder_input_size, "width": settings.encoder_input_size}
    processor = {"image_mean": settings.image_mean, "image_std": settings.image_std, "size": side}
    write_json(processor, encoder / "preprocessor_config.json")
    (folder / "decoder_config").mkdir()
    decoder_config = {"model_type": "vit_mae", **settings.decoder_config}
    write_json(decoder_config, folder / "decoder_config" / "config.json")

    write_torch_file(prints.under(content.state, "decoder"), folder / DECODER_FILE)
    write_beside(folder / DECODER_FILE, manifest.only(prints.DECODER))
    if content.latent_std is not None:
        write_torch_file(statistics_of(content), folder / STATISTICS_FILE)
        write_beside(folder / STATISTICS_FILE, manifest.only(prints.STATISTICS))
    section = _section(content, final)
    (folder / SECTION).write_text(yaml.safe_dump({"stage_1": section}, sort_keys=False))


def _section(content: RAEContent, place: Path) -> dict[str, Any]:
    settings = content.settings
    path_name = "dinov2_path" if settings.encoder_cls == "Dinov2withNorm" else "model_name"
    encoder_params: dict[str, Any] = {path_name: str(place / "encoder")}
    if settings.affine_norm:
        encoder_params["normalize"] = False
    statistics = None if content.latent_std is None else str(place / STATISTICS_FILE)
    params = {
        "encoder_cls": settings.encoder_cls,
        "encoder_config_path": str(place / "encoder"),
        "encoder_input_size": settings.encoder_input_size,
        "encoder_params": encoder_params,
        "decoder_config_path": str(place / "decoder_config"),
        "decoder_patch_size": settings.decoder_config["patch_size"],
        "pretrained_decoder_path": str(place / DECODER_FILE),
        "noise_tau": settings.noise_tau,
        "reshape_to_2d": settings.reshape_to_2d,
        "normalization_stat_path": statistics,
    }
    return {"target": "stage1.RAE", "params": params}
