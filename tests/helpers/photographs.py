"""JPEGs of about the size and decoding cost of photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from rae_xla.data.shards.encoding import ShardSample
from rae_xla.data.shards.index import ShardIndex
from rae_xla.data.shards.writer import write_shards


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG of ``size`` (width, height), quality 90: shapes with fine-grained noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    shapes = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    fine = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    noise = np.asarray(fine.filter(ImageFilter.GaussianBlur(0.9)), np.int16) - 128
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(shapes + noise, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photographs(
    folder: str, count: int, size: tuple[int, int], *, classes: int = 10, **options: int
) -> ShardIndex:
    """Write shards of ``count`` photographs; ``options`` are those of ``write_shards``."""
    samples = (ShardSample(photograph(i, size), "jpg", i % classes) for i in range(count))
    names = [str(label) for label in range(classes)]
    return write_shards(samples, folder, classes=names, **options)
