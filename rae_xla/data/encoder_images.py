"""Image preprocessing of the encoders of Scale-RAE, as their processors of transformers do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from rae_xla.data.image_decoding import to_rgb
from rae_xla.data.transforms import Pixels


@dataclass(frozen=True)
class EncoderResize:
    """Resize an image to the square that an encoder sees, as a ``Transform``.

    Attributes:
        size: side of the square in pixels.
        fit: ``stretch`` ignores the aspect ratio (SigLIP2); ``crop`` resizes the shorter side to
            ``size`` and keeps the centre (WebSSL-DINO).
        resample: a filter of PIL, such as ``Image.Resampling.BICUBIC``.
    """

    size: int
    fit: Literal["stretch", "crop"] = "stretch"
    resample: Image.Resampling = Image.Resampling.BILINEAR

    def __call__(self, image: Image.Image, u: Sequence[float] = ()) -> Pixels:
        """Return the square, uint8 (size, size, 3); the uniforms are ignored."""
        image = to_rgb(image)
        if self.fit == "stretch":
            return np.asarray(image.resize((self.size, self.size), self.resample))
        short, long = sorted(image.size)
        longer = int(self.size * long / short)
        wide = image.width > image.height
        target = (longer, self.size) if wide else (self.size, longer)
        image = image.resize(target, self.resample)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


SIGLIP2_224 = EncoderResize(224)
"""Preprocessing of google/siglip2-so400m-patch14-224."""
WEBSSL_224 = EncoderResize(224, "crop", Image.Resampling.BICUBIC)
"""Preprocessing of facebook/webssl-dino300m-full2b-224 in Scale-RAE, without its 8/7 margin."""
