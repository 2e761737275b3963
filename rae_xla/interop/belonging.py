"""Which files belong together: their manifests, as they are written and as they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rae_xla.data.storage import is_remote
from rae_xla.interop import fingerprint as prints
from rae_xla.interop.assembly import EPS
from rae_xla.interop.checkpoint_folder import TIES, find_checkpoints
from rae_xla.interop.checkpoint_folder import read_manifest as read_facts
from rae_xla.interop.manifest import (
    Manifest,
    Part,
    check_parts,
    checks_wanted,
    manifest_path,
    parse_manifest,
    read_manifest,
)
from rae_xla.models.weights import is_meta

if TYPE_CHECKING:
    from rae_xla.models.rae import RAE


def check_rae_files(rae: RAE, params: Mapping[str, Any]) -> None:
    """See that a decoder and latent statistics were made with this encoder.

    Args:
        rae: built from these files; not on the meta device.
        params: what it was built with. Files without a manifest are not checked.

    Raises:
        UserError: one was made with another encoder; both are named.
    """
    files = {key: params.get(key) for key in ("pretrained_decoder_path", "normalization_stat_path")}
    manifests = _manifests(*files.values())
    if manifests:
        names = {
            prints.ENCODER: str(params.get("encoder_config_path", "")),
            prints.DECODER: str(files["pretrained_decoder_path"]),
            prints.STATISTICS: str(files["normalization_stat_path"]),
        }
        actual = {kind: Part(sha256, names[kind]) for kind, sha256 in prints.of_rae(rae).items()}
        for path, manifest in manifests.items():
            check_parts(manifest, actual, path)


def check_dit_file(path: str | Path | None, rae: RAE, name: str = "stage_1") -> None:
    """See that a diffusion transformer was trained in the latents of this autoencoder.

    Args:
        path: its weights, or the training's checkpoint; without a manifest they are not checked.
        rae: the autoencoder whose latents it is to draw.
        name: what to call that in errors.

    Raises:
        UserError: it was trained with another encoder or other statistics; both are named.
    """
    for place, manifest in _manifests(path).items():
        if manifest.made_with:
            actual = {kind: Part(sha256, name) for kind, sha256 in prints.of_rae(rae).items()}
            check_parts(manifest, actual, place)


def made_in_latents_of(rae: RAE, params: Mapping[str, Any]) -> Manifest:
    """What a diffusion transformer is tied to that is trained in the latents of an autoencoder.

    Args:
        rae: on the host, or on the meta device: then nothing is known of it.
        params: what it was built with.
    """
    if is_meta(rae):
        return Manifest()
    needs = {prints.ENCODER: encoder_of(rae, str(params.get("encoder_config_path", "")))}
    if rae.latent_std is not None:
        sha256 = prints.of_statistics(rae.latent_mean, rae.latent_std)
        needs[prints.STATISTICS] = Part(sha256, str(params.get("normalization_stat_path", "")))
    return Manifest(made_with={prints.DIT: needs})


def encoder_of(rae: RAE, name: str) -> Part:
    """An autoencoder's encoder as a part."""
    return Part(prints.fingerprint(rae.encoder.state_dict()), name)


def write_statistics_manifest(path: Path, mean: Tensor, var: Tensor, encoder: Part) -> None:
    """Write the manifest of a file of latent statistics, beside it."""
    part = Part(prints.of_statistics(mean, torch.sqrt(var + EPS)), str(path))
    manifest = Manifest({prints.STATISTICS: part}, {prints.STATISTICS: {prints.ENCODER: encoder}})
    write_beside(path, manifest)


def manifest_of_state(state: Mapping[str, Tensor], name: str) -> Manifest:
    """The manifest of an autoencoder's state dict; of one without an encoder, tied to none."""
    under = {kind: prints.under(state, kind) for kind in (prints.ENCODER, prints.DECODER)}
    parts = {kind: Part(prints.fingerprint(of), name) for kind, of in under.items() if of}
    if prints.ENCODER not in parts:
        return Manifest(parts)
    return Manifest(parts, {prints.DECODER: {prints.ENCODER: parts[prints.ENCODER]}})


def write_beside(path: Path, manifest: Manifest) -> None:
    """Write a file's manifest, or remove an older one where there is nothing to say."""
    if manifest.parts:
        manifest_path(path).write_text(manifest.to_json())
    else:
        manifest_path(path).unlink(missing_ok=True)


def _manifests(*paths: Any) -> dict[str, Manifest]:
    if not checks_wanted():
        return {}
    found = {str(path): _manifest_of(str(path)) for path in paths if path is not None}
    return {path: manifest for path, manifest in found.items() if manifest is not None}


def _manifest_of(path: str) -> Manifest | None:
    """Of weights, or of a training checkpoint, which has it within its own."""
    remote = is_remote(path)
    if not remote and (manifest := read_manifest(path)) is not None:
        return manifest
    if not remote and not Path(path).expanduser().is_dir():
        return None
    checkpoints = find_checkpoints(path)
    said = read_facts(checkpoints[-1]).get(TIES) if checkpoints else None
    return None if said is None else parse_manifest(said, checkpoints[-1].path)
