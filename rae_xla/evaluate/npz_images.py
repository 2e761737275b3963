"""The pictures of an ``.npz`` file as the ADM suite writes it, read a few at a time."""

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
from rae_xla.sample.pictures import Pixels

SHOWN_DIGITS = 12
IMAGES = "arr_0"


class NpzImages:
    """``arr_0``, uint8 (N, H, H, 3), of an ``.npz`` file. Only its header is read at first: 50,000
    pictures would fill the memory.

    Args:
        path: of the file.
        what: what to call it in an error.

    Attributes:
        count: pictures in it.
        side: of a picture, in pixels.

    Raises:
        UserError: no such file, no ``.npz``, no ``arr_0``, or one of another shape or type; while
            reading, if it is truncated or damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what
        with open_npz(path, what) as archive:
            if f"{IMAGES}.npy" not in archive.namelist():
                held = ", ".join(array_names(archive)) or "nothing"
                raise UserError(f"{what} {path}: there is no {IMAGES} (images); it has {held}")
            with archive.open(f"{IMAGES}.npy") as member:
                shape, fortran, dtype = self._header(cast("BinaryIO", member))
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
        if dtype != np.uint8 or fortran or not square:
            raise UserError(
                f"{what} {path}: {IMAGES} is {dtype} {shape}; it must be uint8 (N, H, H, 3)"
            )
        self.count, self.side = shape[0], shape[1]

    def chunks(self, rows: int) -> Iterator[Pixels]:
        """All pictures, (n, 3, H, H), ``rows`` at a time."""
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
                    raise UserError(f"{self._what} {self.path}: {IMAGES} is truncated")
                pixels = np.frombuffer(data, np.uint8).reshape(count, *shape)
                yield np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

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
    """The archive behind an ``.npz``; its faults are the user's to hear of."""
    if not path.is_file():
        raise UserError(f"{what} {path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{what} {path} is not a readable .npz file: {error}") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays in it, sorted."""
    return sorted(name.removesuffix(".npy") for name in archive.namelist())


def file_hash(path: Path) -> str:
    """First digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()[:SHOWN_DIGITS]
