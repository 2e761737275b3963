"""Images of an ``.npz`` file as the ADM suite writes it, read a few at a time."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from rae_xla.errors import UserError
from rae_xla.sample.images import Pixels

HASH_DIGITS = 12
"""Hexadecimal digits of a SHA-256 that reports show."""

IMAGES = "arr_0"


class NpzImages:
    """The array ``arr_0``, uint8 (N, H, H, 3), of an ``.npz`` file.

    Images are streamed, because 50,000 of them would need too much memory. The constructor reads
    only the header.

    Args:
        path: path of the file.
        what: what the file is, for error messages, such as ``samples``.

    Attributes:
        count: number of images.
        side: height and width of an image, in pixels.

    Raises:
        UserError: if the file is missing, is not an ``.npz``, or has no ``arr_0`` of this shape
            and type; while reading, if it is truncated or damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what
        with open_npz(path, what) as archive:
            if f"{IMAGES}.npy" not in archive.namelist():
                names = ", ".join(array_names(archive)) or "no arrays"
                raise UserError(f"{what} {path}: {IMAGES} (images) is missing; it contains {names}")
            with archive.open(f"{IMAGES}.npy") as member:
                shape, fortran, dtype = self._header(cast("BinaryIO", member))
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
        if dtype != np.uint8 or fortran or not square:
            raise UserError(
                f"{what} {path}: {IMAGES} is {dtype} {shape}; it must be uint8 (N, H, H, 3)"
            )
        self.count, self.side = shape[0], shape[1]

    def chunks(self, rows: int) -> Iterator[Pixels]:
        """Yield all images, channels first, (n, 3, H, H), ``rows`` at a time."""
        shape = (self.side, self.side, 3)
        with (
            open_npz(self.path, self._what) as archive,
            archive.open(f"{IMAGES}.npy") as member,
        ):
            self._header(cast("BinaryIO", member))
            for start in range(0, self.count, rows):
                count = min(rows, self.count - start)
                data = member.read(count * math.prod(shape))
                if len(data) < count * math.prod(shape):
                    raise UserError(
                        f"{self._what} {self.path}: {IMAGES} is truncated: copy it again"
                    )
                pixels = np.frombuffer(data, np.uint8).reshape(count, *shape)
                yield np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
            if member.read(1):
                raise UserError(
                    f"{self._what} {self.path}: {IMAGES} has more bytes than the {self.count} "
                    "images that it lists: write it again"
                )

    def _header(self, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        try:
            return readers[np.lib.format.read_magic(file)](file)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self._what} {self.path}: {IMAGES} cannot be read: {error}"
            ) from error


@contextmanager
def open_npz(path: Path, what: str) -> Iterator[zipfile.ZipFile]:
    """Open an ``.npz`` file as a zip archive, and report damage while it is open as a user error.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{what} {path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(
            f"{what} {path} is not a readable .npz file ({error}): copy it again"
        ) from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the sorted names of the arrays in an ``.npz`` archive."""
    return sorted(name.removesuffix(".npy") for name in archive.namelist())


def file_hash(path: Path) -> str:
    """Return the first digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()[:HASH_DIGITS]
