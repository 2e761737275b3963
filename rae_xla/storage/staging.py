"""Staging: write a local file or folder with any library, and have it end up in a bucket."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rae_xla import storage


@contextlib.contextmanager
def staged_output(path: str) -> Iterator[Path]:
    """Give a local path to write a file or folder to, which becomes ``path``.

    A local ``path`` is given as it is. For one in a bucket it is a path of the same name in a
    temporary folder. When the block ends without an exception, everything in that folder is
    uploaded next to ``path``: the file or folder, and other files that were written next to it.

    Raises:
        OSError: the upload fails.
    """
    if not storage.is_remote(path):
        yield Path(path)
        return
    parent, name = storage.split(path)
    with tempfile.TemporaryDirectory(prefix="rae-xla-out-") as temporary:
        yield Path(temporary, name)
        for file in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
            upload(file, storage.join(parent, file.relative_to(temporary).as_posix()))


@contextlib.contextmanager
def staged_input(path: str) -> Iterator[Path]:
    """Give a local copy of a file; a local file itself.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the download fails.
    """
    if not storage.is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="rae-xla-in-") as temporary:
        copy = Path(temporary, storage.split(path)[1])
        download(path, copy)
        yield copy


def upload(file: Path, path: str) -> None:
    """Copy a local file to a path; it appears there complete or not at all."""
    with file.open("rb") as source, storage.create(path) as target:
        shutil.copyfileobj(source, target, 1 << 20)


def download(path: str, file: Path) -> None:
    """Copy a file to a local path, whose folder is created; it appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with storage.open_read(path) as source, storage.create(str(file)) as target:
        shutil.copyfileobj(source, target, 1 << 20)


def check_writable(folder: str) -> None:
    """Create a folder unless it exists, and write, then delete, an empty file in it.

    Raises:
        OSError: the folder cannot be written.
    """
    storage.make_folder(folder)
    probe = storage.join(folder, f".rae-xla{storage.TEMPORARY_MARK}probe")
    storage.write_bytes(probe, b"")
    with contextlib.suppress(FileNotFoundError):
        storage.remove(probe)
