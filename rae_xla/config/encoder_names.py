"""Encoder names of RAEv2, such as ``dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]``.

The families differ in how they fuse layers and in their final norm (nanovisionx/RAEv2 @ 8a0d238,
``src/encoders/vision_encoder.py``). Images are always normalised with ImageNet's statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rae_xla.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NAME = re.compile(r"(\w+?)(mls)?-(vit-\w+)(?:\[([^\]]*)\])?")
# RAEv2 replaces the final norms by ones with this epsilon, except for SigLIP2's.
_NORM_EPS = 1e-5


@dataclass(frozen=True)
class _Family:
    """An encoder family of RAEv2.

    Attributes:
        encoder_cls: our class.
        title: for messages.
        hub_ids: architecture -> hub id of the model.
        affine: whether the final norm keeps its affine map without the flag ``norm``.
        token_mean: whether fused tokens contain the mean over the tokens of the last layer.
        norm_eps: epsilon of the final norm; None for the model's.
        patch: side of a patch in pixels.
    """

    encoder_cls: str
    title: str
    hub_ids: Mapping[str, str]
    affine: bool
    token_mean: bool
    norm_eps: float | None
    patch: int


_DINOV3 = {
    f"vit-{letter}16": f"facebook/dinov3-vit{letter}16-pretrain-lvd1689m"
    for letter in ("s", "b", "l")
}
_DINOV2 = {
    f"vit-{size[0]}": f"facebook/dinov2-with-registers-{size}"
    for size in ("small", "base", "large", "giant")
}
_SIGLIP2 = {
    "vit-b": "google/siglip2-base-patch16-256",
    "vit-l": "google/siglip2-large-patch16-256",
    "vit-so400m": "google/siglip2-so400m-patch16-256",
}
_FAMILIES = {
    "dinov3": _Family("DINOv3Encoder", "DINOv3", _DINOV3, False, True, None, 16),
    "dinov2": _Family("Dinov2withNorm", "DINOv2", _DINOV2, False, False, _NORM_EPS, 14),
    "siglip2": _Family("SigLIP2wNorm", "SigLIP2", _SIGLIP2, True, True, None, 16),
    "mae": _Family(
        "MAEwNorm",
        "MAE",
        {"vit-b": "facebook/vit-mae-base", "vit-l": "facebook/vit-mae-large"},
        False,
        False,
        None,
        16,
    ),
}
# Depth of the architectures whose default list of layers RAEv2 has: quarters of the depth.
_DEFAULT_LAYERS = {"vit-l16": [5, 11, 17, 23]}


@dataclass(frozen=True)
class NamedEncoder:
    """What an encoder name of RAEv2 stands for.

    Attributes:
        encoder_cls: name of our class.
        hub_id: Hugging Face model.
        input_size: side in pixels of the images that the encoder receives.
        options: further arguments of the class.
        image_mean: per-channel mean of the image normalisation.
        image_std: per-channel standard deviation.
    """

    encoder_cls: str
    hub_id: str
    input_size: int
    options: dict[str, Any]
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


def parse_encoder_name(name: str, resolution: int) -> NamedEncoder:
    """Parse an encoder name of RAEv2.

    Args:
        name: ``FAMILY-ARCHITECTURE[FLAGS]``; a family that ends with ``mls`` fuses layers.
        resolution: ``stage_1.params.resolution``, the side of the images in pixels.

    Raises:
        UserError: the name is malformed, or its family or architecture is not supported.
    """
    match = _NAME.fullmatch(name)
    flags = {} if match is None else _parse_flags(match[4])
    if match is None or flags is None:
        raise UserError(
            f"encoder_name: {name!r} is not an encoder name of RAEv2, such as dinov3-vit-l16 or "
            "dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]"
        )
    family, architecture = _FAMILIES.get(match[1]), match[3]
    if family is None:
        raise UserError(
            f"encoder_name: the encoder family {match[1]} of RAEv2 is not supported; choose one of "
            f"{', '.join(_FAMILIES)}, or configure the encoder by encoder_cls: HFVisionEncoder"
        )
    if architecture not in family.hub_ids:
        raise UserError(
            f"encoder_name: {family.title} has no architecture {architecture} here; choose one of "
            f"{', '.join(family.hub_ids)}"
        )
    affine = family.affine or "norm" in flags
    options: dict[str, Any] = {} if not affine else {"normalize": False}
    if family.norm_eps is not None:
        options["norm_eps"] = family.norm_eps
    if match[2]:
        layers = flags.get("layers", _DEFAULT_LAYERS.get(architecture))
        if layers is None:
            raise UserError(
                f"encoder_name: {name} needs the list of its layers, such as "
                f"{match[1]}mls-{architecture}[layers=5.11]"
            )
        options |= {"layers": layers, "token_mean": family.token_mean}
    side = resolution // 16  # RAEv2 has one token for every 16 pixels, whatever the patch
    return NamedEncoder(
        family.encoder_cls, family.hub_ids[architecture], side * family.patch, options
    )


def _parse_flags(text: str | None) -> dict[str, Any] | None:
    """Parse ``norm`` and ``layers=1.2.3``, separated by commas; None if they are something else."""
    flags: dict[str, Any] = {}
    for flag in (text or "").split(",") if text else []:
        if flag == "norm":
            flags["norm"] = True
        elif re.fullmatch(r"layers=\d+(\.\d+)*", flag):
            flags["layers"] = [int(number) for number in flag[len("layers=") :].split(".")]
        else:
            return None
    return flags
