"""The names a ``target:`` may have.

The reference names its classes by the Python path of its own modules; those names stand in
everybody's YAML files and are understood here beside ours.
"""

from __future__ import annotations

import difflib

from rae_xla.errors import UserError

# Where each class lives, and the other names it answers to: its short name, then the published.
TARGETS: dict[str, tuple[str, ...]] = {
    "rae_xla.models.rae.RAE": ("RAE", "stage1.RAE", "stage1.rae.RAE"),
    "rae_xla.models.dit_dh.DiTDH": (
        "DiTDH",
        "DiTwDDTHead",
        "stage2.DiTwDDTHead",
        "stage2.models.DDT.DiTwDDTHead",
    ),
    "rae_xla.models.dit.LightningDiT": (
        "LightningDiT",
        "stage2.LightningDiT",
        "stage2.models.lightningDiT.LightningDiT",
    ),
    "rae_xla.models.vit_decoder.ViTDecoder": (
        "ViTDecoder",
        "GeneralDecoder",
        "stage1.decoders.GeneralDecoder",
        "stage1.decoders.decoder.GeneralDecoder",
    ),
    "rae_xla.models.encoders.DINOv2Encoder": (
        "DINOv2Encoder",
        "Dinov2withNorm",
        "stage1.encoders.dinov2.Dinov2withNorm",
    ),
    "rae_xla.models.encoders.SigLIP2Encoder": (
        "SigLIP2Encoder",
        "SigLIP2wNorm",
        "stage1.encoders.siglip2.SigLIP2wNorm",
    ),
    "rae_xla.models.encoders.MAEEncoder": (
        "MAEEncoder",
        "MAEwNorm",
        "stage1.encoders.mae.MAEwNorm",
    ),
}
_BY_NAME = {name: full for full, names in TARGETS.items() for name in (full, *names)}


def full_name(target: str) -> str:
    """The place of the class a name stands for, as ``package.module.Class``.

    Raises:
        UserError: no such name; the message has the nearest one.
    """
    if target in _BY_NAME:
        return _BY_NAME[target]
    # A wrong path before the right class name is the usual slip, but far by edit distance.
    ending = target.rsplit(".", 1)[-1]
    near = [n for n in _BY_NAME if n == ending]
    near = near or difflib.get_close_matches(target, _BY_NAME, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(ending, _BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(_BY_NAME)
    raise UserError(f"unknown target {target!r}: {hint}")
