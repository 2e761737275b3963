"""Provenance: what a checkpoint's manifest records about its run, and checks against it.

The manifest records the configuration, the code and the data of a run, and which encoder and latent
statistics its weights depend on (as the manifests of weight files do,
``models.pretrained.manifest``).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL
import torch
from torch import Tensor

from rae_xla.checkpoint.manager import (
    MANIFEST_FORMAT,
    find_checkpoints,
    read_checkpoint_manifest,
)
from rae_xla.models.pretrained import fingerprint as fingerprints
from rae_xla.models.pretrained.components import AutoencoderBase
from rae_xla.models.pretrained.fingerprint import DIT, ENCODER, STATISTICS
from rae_xla.models.pretrained.latent_statistics import standard_deviation
from rae_xla.models.pretrained.manifest import (
    Manifest,
    Part,
    check_parts,
    checks_enabled,
    parse_manifest,
    read_weights_manifest,
    write_weights_manifest,
)
from rae_xla.models.weights import is_meta
from rae_xla.storage import is_remote
from rae_xla.version import __version__

if TYPE_CHECKING:
    from rae_xla.checkpoint.train_state import Checkpointable
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend

PROVENANCE_KEY = "belongs_with"
"""Entry of a checkpoint's manifest with the encoder and latent statistics the weights depend on.

Checkpoints have had this entry under this name since the first release.
"""


def run_facts(
    config: RunConfig, backend: Backend, task: Checkpointable, step: int, data: str
) -> dict[str, Any]:
    """Return what a checkpoint's manifest records about the run, all but the files.

    The order of the samples and all random numbers are functions of the seed and the step, so these
    two are the complete position in the data.

    Args:
        config: of the run.
        backend: of the run.
        task: that is trained.
        step: optimizer steps taken.
        data: fingerprint of the training data.
    """
    rates = {name: value.item() for name, value in task.inputs(step).items()}
    return {
        "format": MANIFEST_FORMAT,
        "step": step,
        "seed": config.training.global_seed,
        "data": {"position": step, "fingerprint": data},
        "scheduler": {"next_step": rates},
        PROVENANCE_KEY: task.provenance.to_dict(),
        "code": code_version(),
        "written_by": {
            "backend": backend.name,
            "mesh": str(backend.mesh),
            "processes": backend.process_count,
        },
        "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_dict(),
    }


def code_version() -> str:
    """Return the versions that determine a run's numbers, together with its configuration.

    These are the version and hash of this package's source, and the versions of torch and Pillow.
    """
    return (
        f"rae_xla {__version__} {_code_hash()}, torch {torch.__version__}, Pillow {PIL.__version__}"
    )


@functools.cache
def _code_hash() -> str:
    """Return a hash of the package's source; the version alone does not reveal local edits."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def latent_provenance(rae: AutoencoderBase, params: Mapping[str, Any]) -> Manifest:
    """Return the provenance of a diffusion transformer trained in an autoencoder's latents.

    Args:
        rae: the autoencoder on the host; on the meta device it has no values, and the result is
            an empty manifest.
        params: its constructor arguments, whose paths name the parts.
    """
    if is_meta(rae):
        return Manifest()
    needs = {ENCODER: encoder_part(rae, str(params.get("encoder_config_path", "")))}
    if rae.latent_std is not None:
        sha256 = fingerprints.of_statistics(rae.latent_mean, rae.latent_std)
        needs[STATISTICS] = Part(sha256, str(params.get("normalization_stat_path", "")))
    return Manifest(made_with={DIT: needs})


def encoder_part(rae: AutoencoderBase, name: str) -> Part:
    """Return the fingerprint of an autoencoder's encoder, with a name that describes its source."""
    return Part(fingerprints.fingerprint(rae.encoder.state_dict()), name)


def check_dit_file(path: str | Path | None, rae: AutoencoderBase, name: str = "stage_1") -> None:
    """Check that a diffusion transformer was trained in the latents of this autoencoder.

    Args:
        path: of its weights, or of a training checkpoint. Those without a manifest, and None, are
            not checked.
        rae: the autoencoder in whose latents it will generate.
        name: of the autoencoder, for error messages.

    Raises:
        UserError: if it was trained with another encoder or other statistics; names both.
    """
    if path is None or not checks_enabled():
        return
    for source, manifest in _recorded_provenance(str(path)).items():
        if manifest.made_with:
            actual = {kind: Part(sha256, name) for kind, sha256 in fingerprints.of_rae(rae).items()}
            check_parts(manifest, actual, source)


def _recorded_provenance(path: str) -> dict[str, Manifest]:
    """Return the manifest of weights or of the newest checkpoint at a path, by its source."""
    local = not is_remote(path)
    if local and (manifest := read_weights_manifest(path)) is not None:
        return {path: manifest}
    if local and not Path(path).expanduser().is_dir():
        return {}
    checkpoints = find_checkpoints(path)
    if not checkpoints:
        return {}
    recorded = read_checkpoint_manifest(checkpoints[-1]).get(PROVENANCE_KEY)
    return {} if recorded is None else {path: parse_manifest(recorded, checkpoints[-1].path)}


def write_statistics_manifest(path: Path, mean: Tensor, var: Tensor, encoder: Part) -> None:
    """Write the manifest of a file of latent statistics.

    Args:
        path: of the statistics.
        mean: as in the file.
        var: as in the file.
        encoder: whose latents were measured.
    """
    part = Part(fingerprints.of_statistics(mean, standard_deviation(var)), str(path))
    manifest = Manifest({STATISTICS: part}, {STATISTICS: {ENCODER: encoder}})
    write_weights_manifest(path, manifest)
