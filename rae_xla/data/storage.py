"""The only place that touches bytes: local paths and ``gs://`` behind the same few functions.

A path with a scheme (``gs://bucket/folder``) goes through fsspec, imported on first use; anything
else is a local path, a gcsfuse mount included. Missing files raise ``FileNotFoundError`` on both.
"""

from __future__ import annotations

import base64
import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

READ_AHEAD = 16 << 20
"""Bytes: the read-ahead block at which streaming a tar over gcsfs is no longer request-bound."""

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


def join(folder: str, name: str) -> str:
    """``folder/name``, with the separator the kind of path wants."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def split(path: str) -> tuple[str, str]:
    """The folder of ``path`` and the name in it."""
    if not is_remote(path):
        return os.path.split(os.path.abspath(path))
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder, name


def open_read(path: str) -> BinaryIO:
    """Open for reading from front to back."""
    if not is_remote(path):
        return open(path, "rb")
    files, inside = _remote(path)
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
    files, inside = _remote(path)
    pinned = {"generation": generation} if generation is not None else {}
    return bytes(files.cat_file(inside, start=start, end=start + length, **pinned))


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
    """Write a file that appears, whole, when the block ends; after an exception it never does."""
    if is_remote(path):
        files, inside = _remote(path)
        upload = files.open(inside, "wb", autocommit=False)
        try:
            yield upload
        except BaseException:
            upload.discard()
            raise
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
    files, inside = _remote(path)
    return bool(files.exists(inside))


def is_folder(path: str) -> bool:
    """Whether ``path`` is a folder (on a bucket: a prefix with something under it)."""
    if not is_remote(path):
        return os.path.isdir(path)
    files, inside = _remote(path)
    return bool(files.isdir(inside))


def size(path: str) -> int:
    """Bytes of the file at ``path``."""
    if not is_remote(path):
        return os.path.getsize(path)
    files, inside = _remote(path)
    return int(files.size(inside))


def list_files(folder: str) -> dict[str, FileInfo]:
    """The files that lie directly in ``folder`` by name, in one listing."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {e.name: FileInfo(e.stat().st_size) for e in entries if e.is_file()}
    files, inside = _remote(folder)
    try:
        listed = files.ls(inside, detail=True, refresh=True)
    except FileNotFoundError:
        return {}  # A bucket has no folders: one with nothing in it does not exist.
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: _file_info(entry)
        for entry in listed
        if entry["type"] == "file"
    }


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
        files.makedirs(inside, exist_ok=True)


def remove(path: str) -> None:
    """Delete one file."""
    if not is_remote(path):
        os.remove(path)
        return
    files, inside = _remote(path)
    files.rm_file(inside)


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Linux gives at most 2 GiB a call and may give less: ask until it is all there or ends."""
    first = os.pread(descriptor, length, start)
    if len(first) == length or not first:
        return first
    return first + _pread(descriptor, start + len(first), length - len(first))


def _remote(path: str) -> tuple[Any, str]:
    """The fsspec file system of ``path`` and the path inside it."""
    options: dict[str, Any] = {}
    if path.startswith("gs://"):
        # Must stand before gcsfs is imported: the look-up of the bucket's type it turns off costs
        # a request per operation, and blocks for a minute where the account may not make it.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import aiohttp

        # gcsfs has no read timeout of its own, and it retries socket timeouts but no total one.
        options["requests_timeout"] = aiohttp.ClientTimeout(
            total=None, sock_connect=10, sock_read=20
        )
    import fsspec

    return cast("tuple[Any, str]", fsspec.core.url_to_fs(path, **options))
