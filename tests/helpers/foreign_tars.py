"""WebDataset tars as other tools write them, for the tests of data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def jpeg(number: int, width: int = 24, height: int = 20) -> bytes:
    """Return a small image that differs for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def imagenet_members(first: int, count: int, classes: int = 3) -> list[Member]:
    """Return samples named as in the public ``imagenet1k-train-{0000..1023}.tar``: jpg, cls, json.

    The labels cycle through 0 to ``classes - 1``.
    """
    members: list[Member] = []
    for number in range(first, first + count):
        key = f"n{number % classes:08d}_{number}"
        members += [
            (f"{key}.cls", f"{number % classes}\n".encode()),
            (f"{key}.jpg", jpeg(number)),
            (f"{key}.json", b'{"width": 24}'),
        ]
    return members


def write_tar(path: Path, members: Sequence[Member], format: int = tarfile.PAX_FORMAT) -> None:
    """Write members with times and owners, unlike our own tars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1.5e9 + 0.25, "user"
            tar.addfile(info, io.BytesIO(content))


def write_imagenet(folder: Path, tars: int = 3, count: int = 7) -> str:
    """Write ``tars`` tars of ``count`` samples; return the brace pattern that names them."""
    for number in range(tars):
        members = imagenet_members(number * count, count)
        write_tar(folder / f"imagenet1k-train-{number:04d}.tar", members)
    return str(folder / f"imagenet1k-train-{{0000..{tars - 1:04d}}}.tar")
