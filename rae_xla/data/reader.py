"""One sample by its number: a range read, a checksum, a decode, a transform."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rae_xla.data.cache import RangeCache
from rae_xla.data.faults import SampleError
from rae_xla.data.index import ShardIndex
from rae_xla.data.order import Ids
from rae_xla.data.read_ahead import ReadAhead
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


OF_THIS_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What no sample is to blame for: too many open files, no memory."""


class SampleReader:
    """The samples of one index, for one thread; what is expected is read ahead.

    Args:
        index: of the shards.
        cache: where ranges are kept on this host, if anywhere.
    """

    def __init__(self, index: ShardIndex, cache: RangeCache | None = None) -> None:
        self.index = index
        self._ahead = ReadAhead(index, cache)

    def expect(self, epoch: int, samples: Ids) -> None:
        """Begin to read what ``load`` will be asked for."""
        self._ahead.expect(epoch, samples)

    def load(self, epoch: int, sample: int, transform: Transform, u: Sequence[float]) -> Pixels:
        """The transformed pixels (H, W, 3) of a sample.

        Raises:
            SampleError: naming shard and sample, if its bytes cannot be had or decoded.
        """
        content = self.image(epoch, sample)
        try:
            with Image.open(io.BytesIO(content)) as image:
                return np.asarray(transform(image, u))
        except UserError:
            raise
        except DECODE_ERRORS as error:
            path = self.index.path_of(self.index.shard_of(sample))
            raise SampleError(
                f"{path}: the image of sample {sample} does not decode ({error})",
                "make the shards again without it",
            ) from None

    def image(self, epoch: int, sample: int) -> bytes | memoryview:
        """The encoded image of a sample.

        Raises:
            SampleError: naming shard and sample, if its bytes cannot be had, or are others than
                those that were indexed.
        """
        row = self.index.samples[sample]
        length, crc32 = int(row["size"]), int(row["crc32"])
        early = self._ahead.take(epoch, sample, length)
        if early is not None and len(early) == length and zlib.crc32(early) == crc32:
            return early
        shard, offset = self.index.shard_of(sample), int(row["offset"])
        fault, unreachable = "", False
        # What is wrong in a cache is read once more from the shard.
        for read in (self._ahead.read, self._ahead.read_anew):
            try:
                content = read(shard, offset, length)
            except FileNotFoundError:
                fault = f"sample {sample} is gone: the shard has disappeared or was overwritten"
                continue
            except OSError as error:
                if isinstance(error, PermissionError) or error.errno in OF_THIS_MACHINE:
                    raise UserError(f"{self.index.path_of(shard)}: {error}") from error
                fault, unreachable = f"sample {sample} cannot be read: {error}", True
                break  # it was tried more than once already
            if len(content) != length:
                fault = (
                    f"the shard is truncated: it ends before byte {offset + length}, where sample "
                    f"{sample} ends (the index says {shard.bytes} bytes)"
                )
            elif zlib.crc32(content) != crc32:
                fault = (
                    f"sample {sample} was changed after the index was written (its checksum "
                    "differs)"
                )
            else:
                return content
        raise SampleError(
            f"{self.index.path_of(shard)}: {fault}",
            "copy the shard again and start again",
            unreachable=unreachable,
        )

    def close(self) -> None:
        """Give up what was expected and not asked for."""
        self._ahead.close()


def read_image(index: ShardIndex, sample: int) -> bytes:
    """The encoded image of one sample; see ``SampleReader.image``."""
    return bytes(SampleReader(index).image(0, sample))


def load_sample(index: ShardIndex, sample: int, transform: Transform, u: Sequence[float]) -> Pixels:
    """The transformed pixels (H, W, 3) of one sample; see ``SampleReader.load``."""
    return SampleReader(index).load(0, sample, transform, u)
