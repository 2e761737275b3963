"""What belongs to what: the manifest beside weights, written with them and checked when they load.

A decoder and latent statistics belong to one encoder, a DiT to one encoder and its statistics. Used
with others they run without an error and give noise. So files of weights are accompanied by a small
JSON file that has the fingerprint of every part, and of those that a part was made with:
``weights.manifest.json`` in a folder, ``FILE.manifest.json`` beside a file. Weights without one are
loaded as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rae_xla
from rae_xla.errors import UserError

FOLDER_MANIFEST = "weights.manifest.json"
SUFFIX = ".manifest.json"
IGNORE = "RAE_XLA_IGNORE_MANIFEST"
FORMAT = 1
_WORDS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "statistics": "latent statistics",
    "dit": "diffusion transformer",
}


@dataclass(frozen=True)
class Part:
    """Weights by their fingerprint, and where they came from, for people."""

    sha256: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.sha256[:12]} ({self.name})" if self.name else self.sha256[:12]


@dataclass(frozen=True)
class Manifest:
    """Parts (``encoder``, ``decoder``, ``statistics``, ``dit``), and what each was made with.

    Attributes:
        parts: the weights that lie here.
        made_with: part -> what it needs -> which one that was.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    made_with: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)

    def only(self, kind: str) -> Manifest:
        """What concerns one part."""
        return Manifest(
            {k: v for k, v in self.parts.items() if k == kind},
            {k: v for k, v in self.made_with.items() if k == kind},
        )

    def to_dict(self) -> dict[str, Any]:
        """What the file says."""
        return {
            "format": FORMAT,
            "written_by": f"rae_xla {rae_xla.__version__}",
            "parts": {kind: _plain(part) for kind, part in self.parts.items()},
            "made_with": {
                kind: {other: _plain(part) for other, part in needs.items()}
                for kind, needs in self.made_with.items()
            },
        }

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def manifest_path(weights: Path) -> Path:
    """Where the manifest of a file or a folder of weights is."""
    if weights.is_dir():
        return weights / FOLDER_MANIFEST
    return weights.with_name(weights.name + SUFFIX)


def read_manifest(weights: str | Path) -> Manifest | None:
    """The manifest of a file or a folder of weights; None if it has none.

    Raises:
        UserError: it is not one that this version reads.
    """
    path = manifest_path(Path(weights).expanduser())
    if not path.is_file():
        return None
    try:
        return parse_manifest(json.loads(path.read_text()), path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def parse_manifest(content: Any, path: str | Path) -> Manifest:
    """A manifest from what ``to_dict`` makes of one.

    Args:
        content: of a JSON file.
        path: what to call the file in errors.

    Raises:
        UserError: it is not one that this version reads.
    """
    try:
        if content["format"] != FORMAT:
            raise UserError(f"{path} is of format {content['format']}; this version reads {FORMAT}")
        manifest = Manifest(
            {kind: Part(**part) for kind, part in content["parts"].items()},
            {
                kind: {other: Part(**part) for other, part in needs.items()}
                for kind, needs in content["made_with"].items()
            },
        )
        needed = (kind for needs in manifest.made_with.values() for kind in needs)
        if unknown := {*manifest.parts, *manifest.made_with, *needed} - _WORDS.keys():
            raise KeyError(*unknown)
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged ({type(error).__name__}: {error}): write the weights again, or "
        "remove it to load them unchecked"
    )


def checks_wanted(asked: bool = True) -> bool:
    """Whether manifests are checked; ``RAE_XLA_IGNORE_MANIFEST=1`` turns that off everywhere."""
    return asked and os.environ.get(IGNORE, "") in ("", "0")


def check_parts(manifest: Manifest, actual: Mapping[str, Part], where: str | Path) -> None:
    """See that the parts that are used together belong together.

    Args:
        manifest: of the weights in ``where``.
        actual: what is there, or what they are going to be used with.
        where: what to call them in errors.

    Raises:
        UserError: a part is another one than the manifest says, or was made with another one, or
            a diffusion transformer with latent statistics where there are none, or without; both
            are named.
    """
    for kind, said in manifest.parts.items():
        found = actual.get(kind)
        if found is not None and found.sha256 != said.sha256:
            raise UserError(
                f"{where}: a part was replaced: its manifest was written for the {_WORDS[kind]} "
                f"{said}, here is {found}. {_advice()}"
            )
    for kind, needs in manifest.made_with.items():
        if kind == "dit" and needs and "encoder" in actual:
            _check_statistics(needs.get("statistics"), actual.get("statistics"), where)
        for other, said in needs.items():
            found = actual.get(other)
            if found is not None and found.sha256 != said.sha256:
                raise UserError(
                    f"{where}: {_WORDS[kind]} made with the {_WORDS[other]} {said} cannot be used "
                    f"with the {_WORDS[other]} {found}. {_advice()}"
                )


def _check_statistics(said: Part | None, found: Part | None, where: str | Path) -> None:
    """See that an autoencoder has latent statistics if a diffusion transformer had them."""
    if said is not None and found is None:
        raise UserError(
            f"{where}: {_WORDS['dit']} made with the {_WORDS['statistics']} {said}, and the "
            "autoencoder has none: give it them (stage_1.params.normalization_stat_path, or "
            f"`rae-xla convert --stats FILE` when it is converted). {_advice()}"
        )
    if said is None and found is not None:
        raise UserError(
            f"{where}: {_WORDS['dit']} made without {_WORDS['statistics']} cannot be used with an "
            f"autoencoder that has them, {found}. {_advice()}"
        )


def _advice() -> str:
    return f"Use parts that belong together; if you must mix them, set {IGNORE}=1"


def _plain(part: Part) -> dict[str, Any]:
    return {"sha256": part.sha256, "name": part.name}
