"""Frozen image encoders of the representation autoencoder."""

from __future__ import annotations

from rae_xla.errors import UserError
from rae_xla.models.encoders.dinov3 import DINOv3Encoder
from rae_xla.models.encoders.frozen import (
    DINOv2Encoder,
    FrozenEncoder,
    MAEEncoder,
    SigLIP2Encoder,
    read_image_statistics,
)
from rae_xla.models.encoders.hf_vision import HFVisionEncoder
from rae_xla.models.encoders.webssl import WebSSLEncoder

ENCODERS: dict[str, type[FrozenEncoder]] = {
    "DINOv2Encoder": DINOv2Encoder,
    "Dinov2withNorm": DINOv2Encoder,
    "SigLIP2Encoder": SigLIP2Encoder,
    "SigLIP2wNorm": SigLIP2Encoder,
    "MAEEncoder": MAEEncoder,
    "MAEwNorm": MAEEncoder,
    "WebSSLEncoder": WebSSLEncoder,
    "DINOv3withNorm": DINOv3Encoder,
    "DINOv3Encoder": DINOv3Encoder,
    "HFVisionEncoder": HFVisionEncoder,
}
"""Encoder classes by our names and by the published ones. Saved models contain the last name of a
class here. Add an entry to use another encoder: see docs/extending.md.
"""


def encoder_name(encoder: FrozenEncoder) -> str:
    """Return the name of an encoder's class that saved models contain.

    Raises:
        UserError: the class is not in ``ENCODERS``.
    """
    names = [name for name, cls in ENCODERS.items() if cls is type(encoder)]
    if not names:
        raise UserError(
            f"the encoder class {type(encoder).__name__} is not registered: add it to "
            "rae_xla.models.encoders.ENCODERS before saving"
        )
    return names[-1]


__all__ = [
    "ENCODERS",
    "DINOv2Encoder",
    "DINOv3Encoder",
    "FrozenEncoder",
    "HFVisionEncoder",
    "MAEEncoder",
    "SigLIP2Encoder",
    "WebSSLEncoder",
    "encoder_name",
    "read_image_statistics",
]
