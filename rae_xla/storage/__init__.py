"""Files, local or in a bucket: one small interface for both.

A path with a scheme (``gs://bucket/folder``) is remote; any other path is local, gcsfuse mounts
included. A missing file raises ``FileNotFoundError`` everywhere; any other failure is an
``OSError`` that names the path. The libraries for remote files are imported on first use.

Implementations: ``local``, ``gcs`` (with ``gcs_client``), and ``remote``, what the file systems of
fsspec have in common; schemes other than ``gs://`` and ``file://`` are refused. ``cache`` keeps
byte ranges of remote files on a local disk, ``staging`` writes and reads them as local copies.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import BinaryIO

from rae_xla.errors import UserError
from rae_xla.storage.base import TEMPORARY_MARK, FileInfo, FileSystem
from rae_xla.storage.gcs import GcsFiles
from rae_xla.storage.local import LocalFiles, advise_read, is_on_local_disk
from rae_xla.storage.remote import RemoteFiles

__all__ = [
    "TEMPORARY_MARK",
    "FileInfo",
    "advise_read",
    "create",
    "exists",
    "is_folder",
    "is_local_disk",
    "is_remote",
    "is_within",
    "join",
    "list_files",
    "list_folders",
    "make_folder",
    "open_read",
    "read_bytes",
    "read_range",
    "real_path",
    "remove",
    "size",
    "split",
    "write_bytes",
]


def is_remote(path: str) -> bool:
    """Return whether ``path`` has a scheme, such as ``gs://``."""
    return "://" in path


def is_local_disk(path: str) -> bool:
    """Return whether ``path`` is on a disk of this machine, according to the mount table."""
    return not is_remote(path) and is_on_local_disk(path)


def join(folder: str, name: str) -> str:
    """Return ``folder/name``, with the separator that this kind of path uses."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def real_path(path: str) -> str:
    """Return the canonical form of ``path``: equal for all paths to the same place."""
    return path.rstrip("/") if is_remote(path) else os.path.realpath(path)


def is_within(path: str, folder: str) -> bool:
    """Return whether ``path`` is ``folder``, or a file or folder in it, whatever their spelling."""
    inner, outer = real_path(path), real_path(folder)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def split(path: str) -> tuple[str, str]:
    """Return the folder of ``path`` and the name within it."""
    if not is_remote(path):
        return os.path.split(os.path.abspath(path))
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder, name


def open_read(path: str) -> BinaryIO:
    """Open a file for sequential reading.

    If an object in a bucket is overwritten meanwhile, the next read raises ``FileNotFoundError``.
    """
    return _file_system(path).open_read(path)


def read_bytes(path: str) -> bytes:
    """Return the content of a file."""
    with open_read(path) as file:
        return file.read()


def read_range(path: str, start: int, length: int, generation: str | None = None) -> bytes:
    """Return ``length`` bytes from offset ``start``, or fewer if the file ends before.

    Args:
        path: the file.
        start: offset of the first byte.
        length: number of bytes.
        generation: of an object in a bucket, from ``list_files``: if the object was overwritten
            since, raise ``FileNotFoundError`` rather than return bytes of another version.
    """
    return _file_system(path).read_range(path, start, length, generation)


def create(path: str) -> AbstractContextManager[BinaryIO]:
    """Write a file atomically.

    Returns:
        A context manager that gives a file to write to. The file appears under its name when the
        block ends; after an exception it does not.
    """
    return _file_system(path).create(path)


def write_bytes(path: str, content: bytes) -> None:
    """Write a file with this content atomically."""
    with create(path) as file:
        file.write(content)


def exists(path: str) -> bool:
    """Return whether there is a file or folder at ``path``."""
    return _file_system(path).exists(path)


def is_folder(path: str) -> bool:
    """Return whether ``path`` is a folder (in a bucket: a prefix of some object's name)."""
    return _file_system(path).is_folder(path)


def size(path: str) -> int:
    """Return the size of a file in bytes."""
    return _file_system(path).size(path)


def list_files(folder: str) -> dict[str, FileInfo]:
    """Return the files directly in ``folder`` by name, from one listing."""
    return _file_system(folder).list_files(folder)


def list_folders(folder: str) -> list[str]:
    """Return the names of the folders directly in ``folder``; none if it does not exist."""
    return _file_system(folder).list_folders(folder)


def make_folder(path: str) -> None:
    """Create a folder and its parents."""
    _file_system(path).make_folder(path)


def remove(path: str) -> None:
    """Delete a file."""
    _file_system(path).remove(path)


_LOCAL: FileSystem = LocalFiles()
_REMOTE: dict[str, FileSystem] = {"gs": GcsFiles(), "file": RemoteFiles()}


def _file_system(path: str) -> FileSystem:
    """Return the implementation for the scheme of ``path``."""
    if not is_remote(path):
        return _LOCAL
    scheme = path.partition("://")[0]
    if scheme not in _REMOTE:
        raise UserError(f"{path}: {scheme}:// is not supported: give a local path or gs://…")
    return _REMOTE[scheme]
