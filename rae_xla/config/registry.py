"""Registry: the names that a ``target:`` key may have, and the class that each refers to.

It is a table of strings; ``rae_xla.interop.instantiate`` imports the classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rae_xla.errors import UserError

# Full path of a class -> its other names: the short name, the names that the published code uses
# (the paths of its own modules), and the paths of the class in earlier versions of rae_xla, which
# saved config.yaml files contain.
TARGETS: dict[str, tuple[str, ...]] = {
    "rae_xla.models.rae.RAE": ("RAE", "stage1.RAE", "stage1.rae.RAE"),
    "rae_xla.models.dit_dh.DiTDH": (
        "DiTDH",
        "DiTwDDTHead",
        "stage2.DiTwDDTHead",
        "stage2.models.DDT.DiTwDDTHead",
        "DiTwDDTHeadIG",
        "stage2.models.DDT.DiTwDDTHeadIG",
    ),
    "rae_xla.models.dit.LightningDiT": (
        "LightningDiT",
        "stage2.LightningDiT",
        "stage2.models.lightningDiT.LightningDiT",
        "LightningDiTIG",
        "stage2.models.lightningDiT.LightningDiTIG",
    ),
    "rae_xla.models.decoder.ViTDecoder": (
        "ViTDecoder",
        "GeneralDecoder",
        "stage1.decoders.GeneralDecoder",
        "stage1.decoders.decoder.GeneralDecoder",
        "rae_xla.models.vit_decoder.ViTDecoder",
    ),
    "rae_xla.models.encoders.frozen.DINOv2Encoder": (
        "DINOv2Encoder",
        "Dinov2withNorm",
        "stage1.encoders.dinov2.Dinov2withNorm",
        "rae_xla.models.encoders.DINOv2Encoder",
    ),
    "rae_xla.models.encoders.frozen.SigLIP2Encoder": (
        "SigLIP2Encoder",
        "SigLIP2wNorm",
        "stage1.encoders.siglip2.SigLIP2wNorm",
        "rae_xla.models.encoders.SigLIP2Encoder",
    ),
    "rae_xla.models.encoders.frozen.MAEEncoder": (
        "MAEEncoder",
        "MAEwNorm",
        "stage1.encoders.mae.MAEwNorm",
        "rae_xla.models.encoders.MAEEncoder",
    ),
}
_FULL_NAMES = {name: full for full, names in TARGETS.items() for name in (full, *names)}


def register_target(path: str, names: Sequence[str] = ()) -> None:
    """Add a class to the registry.

    Args:
        path: full path of the class, ``package.module.Class``.
        names: other names of the class, such as a short one.
    """
    TARGETS[path] = tuple(names)
    _FULL_NAMES.update(dict.fromkeys((path, *names), path))


def full_name(target: str) -> str:
    """Return the full path of the class that a target names, as ``package.module.Class``.

    Raises:
        UserError: the name is unknown; the message suggests the most similar one.
    """
    if target in _FULL_NAMES:
        return _FULL_NAMES[target]
    # The usual mistake, a wrong path before the right class name, is far by edit distance.
    class_name = target.rsplit(".", 1)[-1]
    similar = [n for n in _FULL_NAMES if n == class_name]
    similar = similar or difflib.get_close_matches(target, _FULL_NAMES, n=1, cutoff=0.5)
    similar = similar or difflib.get_close_matches(class_name, _FULL_NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {similar[0]}?" if similar else "known: " + ", ".join(_FULL_NAMES)
    raise UserError(f"unknown target {target!r}: {hint}")
