"""Layouts: write a model source for the published code, diffusers or ``from_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rae_xla.data.class_names import record_class_names
from rae_xla.errors import UserError
from rae_xla.interop.model_source import ModelSource
from rae_xla.models.pretrained.components import RAEComponents
from rae_xla.models.pretrained.diffusers_folder import write_diffusers, write_json
from rae_xla.models.pretrained.dit_layouts import to_raev2
from rae_xla.models.pretrained.fingerprint import DECODER, STATISTICS, select_prefix
from rae_xla.models.pretrained.manifest import (
    Manifest,
    rae_state_manifest,
    write_weights_manifest,
)
from rae_xla.models.pretrained.model_folder import new_folder, write_rae, write_transformer
from rae_xla.models.pretrained.weight_files import open_weights_source
from rae_xla.models.weights import write_safetensors, write_torch_file

LAYOUTS = ("published", "safetensors", "diffusers", "pretrained")
DECODER_FILE, STATISTICS_FILE, SECTION_FILE = "decoder.pt", "stat.pt", "stage_1.yaml"


def write_layout(
    source: ModelSource,
    layout: str,
    out: Path,
    *,
    transformers: int = 4,
    other_positions: bool = False,
) -> str:
    """Write a model source in a layout.

    Args:
        source: what to write.
        layout: one of ``LAYOUTS``.
        out: the file, or a folder that does not exist yet.
        transformers: see ``diffusers_folder.write_diffusers``; likewise ``other_positions``.

    Returns:
        One line that describes what was written.

    Raises:
        UserError: the layout cannot represent the source, or the file cannot be written; nothing
            is left behind.
    """
    if layout == "diffusers":
        components = _components(source, "diffusers' layout")
        with new_folder(out) as folder:
            write_diffusers(
                components, folder, transformers=transformers, other_positions=other_positions
            )
            write_weights_manifest(folder, source.manifest)
        return f"an AutoencoderRAE for diffusers with transformers {transformers}"
    if layout == "pretrained":
        return _write_model_folder(source, out)
    if layout == "published" and source.components is not None:
        with new_folder(out) as folder:
            _write_published_folder(source.components, source.manifest, folder, out)
        return "encoder, decoder and statistics in the published layout, and a stage_1.yaml"
    return _write_file(source, layout, out)


def export_decoder(checkpoint: str | Path, out: Path, weights: str = "ema") -> int:
    """Write the decoder of a stage-1 checkpoint as ``pretrained_decoder_path`` reads it.

    Args:
        checkpoint: a training checkpoint (ours or the published code's), or the state dict of a
            complete RAE.
        out: the torch file, a bare state dict; its manifest is written next to it.
        weights: ``ema`` or ``model``.

    Returns:
        The number of parameters written.

    Raises:
        UserError: the checkpoint has no such weights or no decoder.
    """
    content = open_weights_source(checkpoint, weights=weights)
    state = select_prefix(content.state, "decoder")
    if not state:
        raise UserError(f"{checkpoint} holds no decoder: no key starts with 'decoder.'")
    write_torch_file({name: tensor.contiguous() for name, tensor in state.items()}, out)
    manifest = rae_state_manifest(content.state, str(checkpoint), content.config)
    write_weights_manifest(out, manifest.only(DECODER))
    return sum(tensor.numel() for tensor in state.values())


def _components(source: ModelSource, layout: str) -> RAEComponents:
    """Return the components of a complete autoencoder."""
    if source.components is not None:
        return source.components
    if source.part == "rae":
        raise UserError(
            f"{layout} needs the settings of the autoencoder, which are not in "
            f"{source.description}: give the YAML file of the run (--config)"
        )
    raise UserError(
        f"{layout} holds complete models, not {source.description}: use --to safetensors"
    )


def _write_model_folder(source: ModelSource, out: Path) -> str:
    with new_folder(out) as folder:
        if source.part == "stage2" and source.transformer is not None:
            kind, settings = source.transformer
            write_transformer(kind, settings, source.state, folder, source.shift_base)
            if source.class_names is not None:
                record_class_names(folder, source.class_names)
        else:
            kind = "RAE"
            write_rae(_components(source, "a folder for from_pretrained"), folder)
        write_weights_manifest(folder, source.manifest)
    return f"a folder for {kind}.from_pretrained"


def _write_file(source: ModelSource, layout: str, out: Path) -> str:
    state = to_raev2(source.state) if source.part == "stage2" else source.state
    if layout == "safetensors":
        if out.suffix != ".safetensors":
            raise UserError(f"--out {out}: a safetensors file must be named .safetensors")
        write_safetensors(state, out)
    else:
        if out.suffix == ".safetensors":
            raise UserError(f"--out {out}: the published layout is a torch file, such as .pt")
        write_torch_file({k: v.contiguous() for k, v in state.items()}, out)
    write_weights_manifest(out, source.manifest)
    count = sum(tensor.numel() for tensor in state.values())
    return f"{source.part}, {len(state)} tensors, {count:,} parameters"


def _write_published_folder(
    components: RAEComponents, manifest: Manifest, folder: Path, final: Path
) -> None:
    """Write an autoencoder as the files that a published YAML file names.

    Args:
        components: the autoencoder.
        manifest: its manifest; each file gets the entries of its part.
        folder: exists; gets ``encoder/``, ``decoder_config/``, ``decoder.pt``, ``stat.pt`` and
            ``stage_1.yaml``.
        final: the name that the folder will have, for the paths in ``stage_1.yaml``.
    """
    settings = components.settings
    settings.check_published_encoder("published")
    encoder = folder / "encoder"
    encoder.mkdir()
    trunk = next(k for k in components.state if k.startswith("encoder.")).split(".")[1]
    write_safetensors(
        select_prefix(components.state, f"encoder.{trunk}"), encoder / "model.safetensors"
    )
    write_json(settings.encoder_config, encoder / "config.json")
    side = {"height": settings.encoder_input_size, "width": settings.encoder_input_size}
    processor = {"image_mean": settings.image_mean, "image_std": settings.image_std, "size": side}
    write_json(processor, encoder / "preprocessor_config.json")
    (folder / "decoder_config").mkdir()
    decoder_config = {"model_type": "vit_mae", **settings.decoder_config}
    write_json(decoder_config, folder / "decoder_config" / "config.json")

    write_torch_file(select_prefix(components.state, "decoder"), folder / DECODER_FILE)
    write_weights_manifest(folder / DECODER_FILE, manifest.only(DECODER))
    if components.latent_std is not None:
        write_torch_file(components.statistics(), folder / STATISTICS_FILE)
        write_weights_manifest(folder / STATISTICS_FILE, manifest.only(STATISTICS))
    section = _stage_1_section(components, final)
    (folder / SECTION_FILE).write_text(yaml.safe_dump({"stage_1": section}, sort_keys=False))


def _stage_1_section(components: RAEComponents, folder: Path) -> dict[str, Any]:
    settings = components.settings
    path_name = "dinov2_path" if settings.encoder_cls == "Dinov2withNorm" else "model_name"
    encoder_params: dict[str, Any] = {path_name: str(folder / "encoder")}
    if settings.affine_norm:
        encoder_params["normalize"] = False
    statistics = None if components.latent_std is None else str(folder / STATISTICS_FILE)
    params = {
        "encoder_cls": settings.encoder_cls,
        "encoder_config_path": str(folder / "encoder"),
        "encoder_input_size": settings.encoder_input_size,
        "encoder_params": encoder_params,
        "decoder_config_path": str(folder / "decoder_config"),
        "decoder_patch_size": settings.decoder_config["patch_size"],
        "pretrained_decoder_path": str(folder / DECODER_FILE),
        "noise_tau": settings.noise_tau,
        "reshape_to_2d": settings.reshape_to_2d,
        "normalization_stat_path": statistics,
    }
    return {"target": "stage1.RAE", "params": params}
