"""Weight manifests: small JSON files that record the provenance of weights.

A decoder and latent statistics fit one encoder; a diffusion transformer fits one encoder and its
statistics. Other combinations run without an error and produce noise. So weights are written with a
manifest, and checked against it when they are loaded. It holds the fingerprint of each part and of
the parts that it was trained with. The file is ``weights.manifest.json`` in a folder and
``FILE.manifest.json`` next to a file. (Training checkpoints keep the same content inside their own
``manifest.json``.) Weights without a manifest are loaded unchecked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.pretrained import fingerprint as fingerprints
from rae_xla.models.pretrained.components import AutoencoderBase
from rae_xla.models.pretrained.fingerprint import DECODER, DIT, ENCODER, STATISTICS
from rae_xla.models.pretrained.raev2_files import check_raev2_files
from rae_xla.version import __version__

FOLDER_MANIFEST = "weights.manifest.json"
SUFFIX = ".manifest.json"
IGNORE = "RAE_XLA_IGNORE_MANIFEST"
FORMAT = 2
"""Version of the file. Version 1 has fingerprints of statistics that depend on the processor."""

_READABLE = (1, FORMAT)
_DESCRIPTIONS = {
    ENCODER: "encoder",
    DECODER: "decoder",
    STATISTICS: "latent statistics",
    DIT: "diffusion transformer",
}


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        sha256: its fingerprint; empty if the manifest has none that can be compared.
        name: of its source, for people.
    """

    sha256: str
    name: str = ""

    def matches(self, other: Part) -> bool:
        """Return whether two fingerprints are equal, or cannot be compared."""
        return self.sha256 == other.sha256 or not (self.sha256 and other.sha256)

    def __str__(self) -> str:
        shown = self.sha256[:12] or "of an earlier version"
        return f"{shown} ({self.name})" if self.name else shown


@dataclass(frozen=True)
class Manifest:
    """The parts of a model and the parts that each was trained with.

    Attributes:
        parts: kind (``encoder``, ``decoder``, ``statistics``, ``dit``) -> the part stored here.
        made_with: kind -> kind of another part -> that part at training time.
        decoder_output: what a decoder predicts: ``normalized`` images, or ``pixels``.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    made_with: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)
    decoder_output: str = "normalized"

    def only(self, kind: str) -> Manifest:
        """Return the entries of one part."""
        return Manifest(
            {k: v for k, v in self.parts.items() if k == kind},
            {k: v for k, v in self.made_with.items() if k == kind},
            self.decoder_output if kind == DECODER else "normalized",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "written_by": f"rae_xla {__version__}",
            "parts": {kind: _to_dict(part) for kind, part in self.parts.items()},
            "made_with": {
                kind: {other: _to_dict(part) for other, part in needs.items()}
                for kind, needs in self.made_with.items()
            },
        }
        if self.decoder_output != "normalized":
            content["decoder_output"] = self.decoder_output
        return content

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


# ----------------------------------------------------------------------------- creating manifests


def rae_parts(rae: AutoencoderBase, name: str) -> dict[str, Part]:
    """Return the parts of an RAE; ``name`` describes their source."""
    return {kind: Part(sha256, name) for kind, sha256 in fingerprints.of_rae(rae).items()}


def rae_manifest(parts: Mapping[str, Part], decoder_output: str) -> Manifest:
    """Return the manifest of an RAE whose parts were trained with each other."""
    encoder = {ENCODER: parts[ENCODER]}
    made_with = {k: encoder for k in (DECODER, STATISTICS) if k in parts}
    return Manifest(parts, made_with, decoder_output)


def rae_state_manifest(
    state: Mapping[str, Tensor], name: str, config: Mapping[str, Any] | None = None
) -> Manifest:
    """Return the manifest of an RAE's state dict; without an encoder, it records none.

    Args:
        state: state dict of the RAE.
        name: description of its source.
        config: configuration of its training, which tells what the decoder predicts.
    """
    stage_1 = (config or {}).get("stage_1") or {}
    output = (stage_1.get("params") or {}).get("decoder_output", "normalized")
    states = {kind: fingerprints.select_prefix(state, kind) for kind in (ENCODER, DECODER)}
    parts = {
        kind: Part(fingerprints.fingerprint(tensors), name)
        for kind, tensors in states.items()
        if tensors
    }
    if ENCODER not in parts:
        return Manifest(parts, decoder_output=output)
    return Manifest(parts, {DECODER: {ENCODER: parts[ENCODER]}}, output)


def dit_manifest(
    state: Mapping[str, Tensor], name: str, rae: AutoencoderBase | None = None
) -> Manifest:
    """Return the manifest of a diffusion transformer.

    Args:
        state: its state dict.
        name: description of its source.
        rae: the RAE it was trained with; None: the manifest records none.
    """
    made_with = {} if rae is None else rae_parts(rae, "the autoencoder of its training")
    made_with.pop(DECODER, None)  # every decoder of the encoder decodes the same latents
    parts = {DIT: Part(fingerprints.fingerprint(state), name)}
    return Manifest(parts, {DIT: made_with} if made_with else {})


# ----------------------------------------------------------------------------- files


def manifest_path(weights: Path) -> Path:
    """Return the path of the manifest of a weight file or a model folder."""
    if weights.is_dir():
        return weights / FOLDER_MANIFEST
    return weights.with_name(weights.name + SUFFIX)


def read_weights_manifest(weights: str | Path) -> Manifest | None:
    """Read the manifest of a weight file or a model folder; None if there is none.

    Raises:
        UserError: this version cannot read the manifest.
    """
    path = manifest_path(Path(weights).expanduser())
    if not path.is_file():
        return None
    try:
        return parse_manifest(json.loads(path.read_text()), path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def write_weights_manifest(weights: Path, manifest: Manifest) -> None:
    """Write the manifest of a weight file or a model folder.

    A manifest without parts is not written, and removes an older one.
    """
    path = manifest_path(weights)
    if manifest.parts:
        path.write_text(manifest.to_json())
    else:
        path.unlink(missing_ok=True)


def parse_manifest(content: Any, path: str | Path) -> Manifest:
    """Parse the content of a manifest, the inverse of ``Manifest.to_dict``.

    Args:
        content: parsed JSON.
        path: the file, for error messages.

    Raises:
        UserError: this version cannot read the manifest.
    """
    try:
        version = content["format"]
        if version not in _READABLE:
            raise UserError(f"{path} has format {version}; this version reads format {FORMAT}")
        manifest = Manifest(
            _read_parts(content["parts"], version),
            {kind: _read_parts(needs, version) for kind, needs in content["made_with"].items()},
            content.get("decoder_output", "normalized"),
        )
        needed = (kind for needs in manifest.made_with.values() for kind in needs)
        if unknown := {*manifest.parts, *manifest.made_with, *needed} - _DESCRIPTIONS.keys():
            raise KeyError(*unknown)
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _read_parts(content: Mapping[str, Mapping[str, str]], version: int) -> dict[str, Part]:
    parts = {kind: Part(**part) for kind, part in content.items()}
    if version == 1 and STATISTICS in parts:
        parts[STATISTICS] = Part("", parts[STATISTICS].name)
    return parts


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged ({type(error).__name__}: {error}): write the weights again, or "
        "remove it to load them unchecked"
    )


# ----------------------------------------------------------------------------- checks


def checks_enabled(requested: bool = True) -> bool:
    """Return whether manifests are checked; ``RAE_XLA_IGNORE_MANIFEST=1`` disables all checks."""
    return requested and os.environ.get(IGNORE, "") in ("", "0")


def check_parts(manifest: Manifest, actual: Mapping[str, Part], source: str | Path) -> None:
    """Raise if parts that are used together do not match.

    Args:
        manifest: manifest of the weights in ``source``.
        actual: kind -> the part that is used, from ``source`` or from elsewhere.
        source: the file or folder, for error messages.

    Raises:
        UserError: a part differs from the one in the manifest; or a part was trained with another
            one; or a diffusion transformer was trained with latent statistics and the autoencoder
            has none, or the reverse. The message names both parts.
    """
    for kind, expected in manifest.parts.items():
        part = actual.get(kind)
        if part is not None and not expected.matches(part):
            raise UserError(
                f"{source}: a part was replaced: its manifest was written for the "
                f"{_DESCRIPTIONS[kind]} {expected}, found {part}. {_advice()}"
            )
    for kind, needs in manifest.made_with.items():
        if kind == DIT and needs and ENCODER in actual:
            _check_statistics(needs.get(STATISTICS), actual.get(STATISTICS), source)
        for other, expected in needs.items():
            part = actual.get(other)
            if part is not None and not expected.matches(part):
                raise UserError(
                    f"{source}: {_DESCRIPTIONS[kind]} created with the {_DESCRIPTIONS[other]} "
                    f"{expected} cannot be used with the {_DESCRIPTIONS[other]} {part}. "
                    f"{_advice()}"
                )


def check_rae_files(rae: AutoencoderBase, params: Mapping[str, Any]) -> None:
    """Raise if a decoder or latent statistics were created with another encoder.

    Args:
        rae: built from files with ``params``; not on the meta device.
        params: its constructor arguments. Files without a manifest are not checked.

    Raises:
        UserError: a file was created with another encoder; the message names both.
    """
    if not checks_enabled():
        return
    check_raev2_files(rae, params)
    sources = {
        ENCODER: str(params.get("encoder_config_path", "")),
        DECODER: params.get("pretrained_decoder_path"),
        STATISTICS: params.get("normalization_stat_path"),
    }
    files = [path for kind, path in sources.items() if kind != ENCODER and path is not None]
    manifests = {path: read_weights_manifest(path) for path in files}
    if any(manifests.values()):
        actual = {
            kind: Part(sha256, str(sources[kind]))
            for kind, sha256 in fingerprints.of_rae(rae).items()
        }
        for path, manifest in manifests.items():
            if manifest is not None:
                check_parts(manifest, actual, path)
                _check_output(manifest, rae.decoder_output, path)


def _check_output(manifest: Manifest, used: str, source: str | Path) -> None:
    """Raise if a decoder predicts something else than the autoencoder takes its output for."""
    if DECODER in manifest.parts and manifest.decoder_output != used:
        raise UserError(
            f"{source}: this decoder was trained to predict {manifest.decoder_output} images, but "
            f"decoder_output is {used}: set stage_1.params.decoder_output to "
            f"{manifest.decoder_output}"
        )


def _check_statistics(expected: Part | None, actual: Part | None, source: str | Path) -> None:
    """Raise unless both the autoencoder and the training of a transformer have statistics."""
    if expected is not None and actual is None:
        raise UserError(
            f"{source}: {_DESCRIPTIONS[DIT]} trained with the {_DESCRIPTIONS[STATISTICS]} "
            f"{expected}, but the autoencoder has none: set "
            "stage_1.params.normalization_stat_path, or convert the autoencoder with "
            f"`rae-xla convert --stats FILE`. {_advice()}"
        )
    if expected is None and actual is not None:
        raise UserError(
            f"{source}: {_DESCRIPTIONS[DIT]} trained without {_DESCRIPTIONS[STATISTICS]} cannot be "
            f"used with an autoencoder that has them, {actual}. {_advice()}"
        )


def _advice() -> str:
    return f"Use matching parts; to mix them on purpose, set {IGNORE}=1"


def _to_dict(part: Part) -> dict[str, Any]:
    return {"sha256": part.sha256, "name": part.name}
