"""The only place that touches bytes: local paths and ``gs://`` behind the same few functions.

A path with a scheme (``gs://bucket/folder``) goes through fsspec, imported on first use; anything
else is a local path, a gcsfuse mount included. Missing files raise ``FileNotFoundError`` on both,
whatever else goes wrong is an ``OSError`` that names the path.

How a bucket is spoken to, and when it is asked again, stands in ``gcs``.
"""

from __future__ import annotations

import base64
import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from rae_xla.data import gcs
from rae_xla.data.gcs import READ_AHEAD, naming

READ_SOON = 128 << 10
"""Bytes that Linux reads ahead of a file unless told otherwise."""

NETWORK_FILE_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "9p", "lustre", "ceph", "beegfs", "gpfs")
"""Their names in the table of mounts begin so; a gcsfuse mount is ``fuse.gcsfuse``."""

TEMPORARY_MARK = ".tmp-"
"""Stands in the name of every file still being written, and in no finished one."""


@dataclass(frozen=True)
class FileInfo:
    """What a listing tells of a file: its bytes; in a bucket, which generation, and its MD5."""

    size: int
    generation: str | None = None
    md5: str | None = None


def is_remote(path: str) -> bool:
    """Whether ``path`` has a scheme and so goes through fsspec."""
    return "://" in path


def is_local_disk(path: str) -> bool:
    """Whether what lies at ``path`` is read from this machine, as far as the mounts tell."""
    if is_remote(path):
        return False
    with contextlib.suppress(OSError, ValueError):
        device = os.stat(path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            for line in table:
                mount, _, kind = line.partition(" - ")
                if mount.split()[2] == number:
                    return not kind.startswith(NETWORK_FILE_SYSTEMS)
    return True


def join(folder: str, name: str) -> str:
    """``folder/name``, with the separator the kind of path wants."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def real_path(path: str) -> str:
    """One name for everything that leads to the same place."""
    return path.rstrip("/") if is_remote(path) else os.path.realpath(path)


def split(path: str) -> tuple[str, str]:
    """The folder of ``path`` and the name in it."""
    if not is_remote(path):
        return os.path.split(os.path.abspath(path))
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder, name


def open_read(path: str) -> BinaryIO:
    """Open for reading from front to back.

    A bucket's object that is written anew in the middle of it raises ``FileNotFoundError``.
    """
    if not is_remote(path):
        return open(path, "rb")
    if path.startswith("gs://"):
        return gcs.open_read(path)
    files, inside = _remote(path)
    with naming(path):
        opened = files.open(inside, "rb", cache_type="readahead", block_size=READ_AHEAD)
    return cast(BinaryIO, opened)


def read_bytes(path: str) -> bytes:
    """The whole file."""
    with open_read(path) as file:
        return file.read()


def read_range(path: str, start: int, length: int, generation: str | None = None) -> bytes:
    """``length`` bytes from ``start``; fewer only where the file ends before.

    With a ``generation`` (of a bucket's object, from ``list_files``), an object that was written
    anew since raises ``FileNotFoundError`` instead of giving bytes of two versions.
    """
    if not is_remote(path):
        # Unbuffered: a buffered file would read 8 KiB more than was asked for.
        with open(path, "rb", buffering=0) as file:
            return _pread(file.fileno(), start, length)
    if path.startswith("gs://"):
        return gcs.read_object(path, start, length, generation)[0]
    files, inside = _remote(path)
    with naming(path):
        return bytes(files.cat_file(inside, start=start, end=start + length))


def read_soon(path: str, start: int, length: int) -> None:
    """Let the kernel read a range of a file on a local disk in the background, if it can."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        # Of one call the kernel takes no more than its read-ahead, usually as much as this.
        for first in range(start, start + length, READ_SOON):
            os.posix_fadvise(
                file.fileno(), first, min(READ_SOON, start + length - first), os.POSIX_FADV_WILLNEED
            )


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
    """Write a file that appears, whole, when the block ends; after an exception it never does."""
    if path.startswith("gs://"):
        with gcs.create(path) as upload:
            yield upload
        return
    if is_remote(path):
        files, inside = _remote(path)
        with naming(path):
            upload = files.open(inside, "wb", autocommit=False)
        try:
            yield upload
        except BaseException:
            upload.discard()
            raise
        with naming(path):
            upload.close()
            upload.commit()
        return
    temporary = f"{path}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # Without it a crash of the machine could leave the final name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file atomically."""
    with create(path) as file:
        file.write(content)


def exists(path: str) -> bool:
    """Whether there is a file or folder at ``path``."""
    if not is_remote(path):
        return os.path.exists(path)
    try:
        return bool(_info(path))
    except FileNotFoundError:
        return False


def is_folder(path: str) -> bool:
    """Whether ``path`` is a folder (on a bucket: a prefix with something under it)."""
    if not is_remote(path):
        return os.path.isdir(path)
    try:
        return bool(_info(path)["type"] == "directory")
    except FileNotFoundError:
        return False


def size(path: str) -> int:
    """Bytes of the file at ``path``."""
    if not is_remote(path):
        return os.path.getsize(path)
    return int(_info(path)["size"])


def list_files(folder: str) -> dict[str, FileInfo]:
    """The files that lie directly in ``folder`` by name, in one listing."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {e.name: FileInfo(e.stat().st_size) for e in entries if e.is_file()}
    files, inside = _remote(folder)
    try:
        with naming(folder):
            listed = files.ls(inside, detail=True)
    except FileNotFoundError:
        return {}  # A bucket has no folders: one with nothing in it does not exist.
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: _file_info(entry)
        for entry in listed
        if entry["type"] == "file"
    }


def list_folders(folder: str) -> list[str]:
    """The names of the folders that lie directly in ``folder``; none where it does not exist."""
    try:
        if not is_remote(folder):
            with os.scandir(folder) as entries:
                return [e.name for e in entries if e.is_dir()]
        files, inside = _remote(folder)
        with naming(folder):
            listed = files.ls(inside, detail=True)
    except FileNotFoundError:
        return []
    names = [entry["name"].rstrip("/") for entry in listed if entry["type"] == "directory"]
    return [name.rpartition("/")[2] for name in names]


def _file_info(entry: dict[str, Any]) -> FileInfo:
    md5 = entry.get("md5Hash")  # base64; an object put together from parts has none
    return FileInfo(
        int(entry["size"]), entry.get("generation"), base64.b64decode(md5).hex() if md5 else None
    )


def make_folder(path: str) -> None:
    """Create a folder and those above it."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)
    elif not path.startswith("gs://"):  # A bucket has no folders.
        files, inside = _remote(path)
        with naming(path):
            files.makedirs(inside, exist_ok=True)


def remove(path: str) -> None:
    """Delete one file."""
    if not is_remote(path):
        os.remove(path)
        return
    files, inside = _remote(path)
    with naming(path):
        files.rm_file(inside)


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Linux gives at most 2 GiB a call and may give less: ask until it is all there or ends."""
    first = os.pread(descriptor, length, start)
    if len(first) == length or not first:
        return first
    return first + _pread(descriptor, start + len(first), length - len(first))


def _remote(path: str) -> tuple[Any, str]:
    """The fsspec file system of ``path`` and the path inside it."""
    if path.startswith("gs://"):
        return gcs.file_system(path)
    import fsspec

    return cast("tuple[Any, str]", fsspec.core.url_to_fs(path))


def _info(path: str) -> dict[str, Any]:
    """What fsspec tells of a file or folder behind it."""
    files, inside = _remote(path)
    with naming(path):
        return cast("dict[str, Any]", files.info(inside))
