"""Remote files through fsspec: what its file systems have in common."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from rae_xla.errors import is_unreachable
from rae_xla.storage.base import FileInfo

READ_AHEAD = 16 << 20
"""Bytes per request when a file is streamed: at this block size gcsfs is bound by bandwidth."""


class RemoteFiles:
    """The ``FileSystem`` of a URL; subclasses replace what one scheme does differently."""

    def resolve(self, path: str) -> tuple[Any, str]:
        """Return the fsspec file system of ``path``, and the path within it."""
        import fsspec

        return cast("tuple[Any, str]", fsspec.core.url_to_fs(path))

    def open_read(self, path: str) -> BinaryIO:
        """See ``storage.open_read``."""
        files, inside = self.resolve(path)
        with errors_name(path):
            opened = files.open(inside, "rb", cache_type="readahead", block_size=READ_AHEAD)
        return cast(BinaryIO, opened)

    def read_range(
        self, path: str, start: int, length: int, generation: str | None = None
    ) -> bytes:
        """See ``storage.read_range``; the generation is ignored."""
        files, inside = self.resolve(path)
        with errors_name(path):
            return bytes(files.cat_file(inside, start=start, end=start + length))

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """See ``storage.create``."""
        files, inside = self.resolve(path)
        with errors_name(path):
            upload = files.open(inside, "wb", autocommit=False)
        try:
            yield upload
        except BaseException:
            upload.discard()
            raise
        with errors_name(path):
            upload.close()
            upload.commit()

    def exists(self, path: str) -> bool:
        """See ``storage.exists``."""
        try:
            return bool(self._info(path))
        except FileNotFoundError:
            return False

    def is_folder(self, path: str) -> bool:
        """See ``storage.is_folder``."""
        try:
            return bool(self._info(path)["type"] == "directory")
        except FileNotFoundError:
            return False

    def size(self, path: str) -> int:
        """See ``storage.size``."""
        return int(self._info(path)["size"])

    def list_files(self, folder: str) -> dict[str, FileInfo]:
        """See ``storage.list_files``."""
        entries = self._list(folder)
        return {_name(entry): _file_info(entry) for entry in entries if entry["type"] == "file"}

    def list_folders(self, folder: str) -> list[str]:
        """See ``storage.list_folders``."""
        return [_name(entry) for entry in self._list(folder) if entry["type"] == "directory"]

    def make_folder(self, path: str) -> None:
        """See ``storage.make_folder``."""
        files, inside = self.resolve(path)
        with errors_name(path):
            files.makedirs(inside, exist_ok=True)

    def remove(self, path: str) -> None:
        """See ``storage.remove``."""
        files, inside = self.resolve(path)
        with errors_name(path):
            files.rm_file(inside)

    def _list(self, folder: str) -> list[dict[str, Any]]:
        files, inside = self.resolve(folder)
        try:
            with errors_name(folder):
                return cast("list[dict[str, Any]]", files.ls(inside, detail=True))
        except FileNotFoundError:
            return []  # Buckets have no folders: an empty one does not exist.

    def _info(self, path: str) -> dict[str, Any]:
        files, inside = self.resolve(path)
        with errors_name(path):
            return cast("dict[str, Any]", files.info(inside))


@contextlib.contextmanager
def errors_name(path: str) -> Iterator[None]:
    """Turn any exception of a client library into an ``OSError`` that names ``path``.

    It is a ``ConnectionError`` if the storage does not respond.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except Exception as error:
        if getattr(error, "code", None) == 401:
            raise PermissionError(
                f"{path}: {error}. Set up credentials: gcloud auth application-default login"
            ) from error
        unreachable = isinstance(error, OSError) and is_unreachable(error)
        kind = ConnectionError if unreachable else OSError
        raise kind(f"{path}: {str(error) or type(error).__name__}") from error


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _file_info(entry: dict[str, Any]) -> FileInfo:
    md5 = entry.get("md5Hash")  # base64; composite objects have none
    return FileInfo(
        int(entry["size"]), entry.get("generation"), base64.b64decode(md5).hex() if md5 else None
    )
