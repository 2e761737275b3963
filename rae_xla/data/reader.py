"""One sample by its number: a range read, a checksum, a decode, a transform."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rae_xla.data import storage
from rae_xla.data.index import ShardIndex
from rae_xla.data.transforms import Pixels, Transform
from rae_xla.errors import UserError

IMAGE_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
"""Names of files and of members of a shard that end so are taken for images."""

DECODE_ERRORS = (
    EOFError,
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for bytes that are not the image they claim to be."""


def read_image(index: ShardIndex, sample: int) -> bytes:
    """The encoded image of a sample.

    Raises:
        UserError: naming the shard, if it is gone, ends before the sample or was changed.
    """
    row = index.samples[sample]
    offset, size = int(row["offset"]), int(row["size"])
    shard = index.shard_of(sample)
    path = index.path_of(shard)
    try:
        content = storage.read_range(path, offset, size)
    except FileNotFoundError:
        raise UserError(f"{path}: the shard has disappeared; put it back and resume") from None
    if len(content) != size:
        raise UserError(
            f"{path}: the shard is truncated: it ends before byte {offset + size}, where sample "
            f"{sample} ends (the index says {shard.bytes} bytes); copy it again and resume"
        )
    if zlib.crc32(content) != int(row["crc32"]):
        raise UserError(
            f"{path}: sample {sample} was changed after the index was written (its checksum "
            "differs); copy the shard again and resume"
        )
    return content


def load_sample(index: ShardIndex, sample: int, transform: Transform, u: Sequence[float]) -> Pixels:
    """The transformed pixels (H, W, 3) of a sample.

    Raises:
        UserError: naming shard and sample, if the bytes cannot be read or decoded.
    """
    content = read_image(index, sample)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(transform(image, u))
    except UserError:
        raise
    except DECODE_ERRORS as error:
        raise UserError(
            f"{index.path_of(index.shard_of(sample))}: the image of sample {sample} does not "
            f"decode ({error}); make the shards again without it"
        ) from None
