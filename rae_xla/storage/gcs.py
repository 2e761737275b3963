"""Google Cloud Storage (``gs://``): pinned range reads and atomic uploads on top of gcsfs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from rae_xla.storage import gcs_client
from rae_xla.storage.remote import READ_AHEAD, RemoteFiles, errors_name

UPLOAD_PART = 16 << 20
"""Bytes of an upload that are sent in one request, and held in memory until then."""


class GcsFiles(RemoteFiles):
    """The ``FileSystem`` of ``gs://``."""

    def resolve(self, path: str) -> tuple[Any, str]:
        """Return gcsfs's file system, and the path within it."""
        timeout = gcs_client.timeout_seconds()  # outside: its error is the user's, not the path's
        with errors_name(path):
            files = gcs_client.client(timeout)
        return files, gcs_client.path_within(files, path)

    def open_read(self, path: str) -> BinaryIO:
        """See ``storage.open_read``; reads ``READ_AHEAD`` bytes per request."""
        return cast(BinaryIO, io.BufferedReader(_ObjectReader(self, path), 1 << 20))

    def read_range(
        self, path: str, start: int, length: int, generation: str | None = None
    ) -> bytes:
        """See ``storage.read_range``."""
        return self.read_object(path, start, length, generation)[0]

    def read_object(
        self, path: str, start: int, length: int, generation: str | None
    ) -> tuple[bytes, int, str | None]:
        """Read a byte range; return it with the size of the object and its generation."""
        files, inside = self.resolve(path)
        if length <= 0:
            return b"", start, generation
        with errors_name(path):
            try:
                headers, content = files.call(
                    "GET",
                    files.url(inside, generation=generation),
                    headers={"Range": f"bytes={start}-{start + length - 1}"},
                )
            except Exception as error:
                if getattr(error, "code", None) != 416:
                    raise
                return b"", start, generation  # the object ends at ``start`` or before
            if "Content-Range" not in headers:
                raise OSError(
                    "the server ignored the byte range; is the object stored with "
                    "Content-Encoding: gzip?"
                )
        size = gcs_client.object_size(headers["Content-Range"])
        return content, size, headers.get("X-Goog-Generation")

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """See ``storage.create``."""
        writer = _ObjectWriter(self, path)
        try:
            yield cast(BinaryIO, writer)
            writer.finish()
        except BaseException:
            with contextlib.suppress(Exception):
                writer.discard()
            raise

    def make_folder(self, path: str) -> None:
        """Do nothing: buckets have no folders."""


class _ObjectReader(io.RawIOBase):
    """Reads an object sequentially, ``READ_AHEAD`` bytes per request, from one generation."""

    def __init__(self, files: GcsFiles, path: str) -> None:
        self._files, self._path = files, path
        self._end, self._size, self._generation = 0, 1, cast("str | None", None)
        self._block = memoryview(b"")
        self._fetch()  # a missing object is reported when it is opened

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block and self._end < self._size:
            self._fetch()
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def readall(self) -> bytes:
        blocks = [self._block]
        while self._end < self._size:
            self._fetch()
            blocks.append(self._block)
        self._block = memoryview(b"")
        return b"".join(blocks)

    def _fetch(self) -> None:
        content, self._size, generation = self._files.read_object(
            self._path, self._end, READ_AHEAD, self._generation
        )
        self._generation = self._generation or generation
        self._block = memoryview(content)
        self._end += len(content)


class _ObjectWriter(io.RawIOBase):
    """Writes an object, which appears complete after ``finish`` and not before.

    Replaces gcsfs's writer: after a part that cannot be sent, that one leaves views of its buffer
    in the traceback, and Python 3.12.1 crashes when it collects them.
    """

    def __init__(self, files: GcsFiles, path: str) -> None:
        self._path = path
        self._files, inside = files.resolve(path)
        self._bucket, self._name, _ = self._files.split_path(inside)
        self._url = gcs_client.upload_url(self._files, self._bucket)
        self._session: str | None = None
        self._sent = 0
        self._pending = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._sent + len(self._pending)

    def write(self, content: Any) -> int:
        self._pending += content
        while len(self._pending) > UPLOAD_PART:
            self._send_part(UPLOAD_PART, "*")
        return memoryview(content).nbytes

    def finish(self) -> None:
        """Send the rest and create the object."""
        if self._session is None:
            options = {"uploadType": "media", "name": self._name}
            self._call("POST", self._url, data=bytes(self._pending), **options)
            return
        total = self.tell()
        # A session was opened, so some bytes are pending; the server may request some again.
        while self._pending:
            self._send_part(len(self._pending), total)

    def discard(self) -> None:
        """Cancel the upload."""
        if self._session is not None:
            # The server expires unfinished uploads anyway, so this does not wait for long.
            self._call("DELETE", self._session, timeout=gcs_client.timeout_seconds() / 4)

    def _send_part(self, length: int, total: int | str) -> None:
        if self._session is None:
            options = {"uploadType": "resumable", "name": self._name}
            self._session = self._call("POST", self._url, json={}, **options)[0]["Location"]
        part = bytes(self._pending[:length])
        content_range = f"bytes {self._sent}-{self._sent + length - 1}/{total}"
        headers, finished = self._call(
            "PUT", self._session, headers={"Content-Range": content_range}, data=part
        )
        if finished:  # the response describes the object
            stored = length
        elif "Range" in headers:  # what the server has of all that was sent, such as bytes=0-99
            stored = int(headers["Range"].rpartition("-")[2]) + 1 - self._sent
        else:
            stored = 0
        if not 0 < stored <= length:
            raise OSError(f"{self._path}: the server ended the upload")
        del self._pending[:stored]
        self._sent += stored

    def _call(self, method: str, url: str, **options: Any) -> tuple[Any, bytes]:
        with errors_name(self._path), _missing_means_bucket(self._bucket):
            return cast("tuple[Any, bytes]", self._files.call(method, url, **options))


@contextlib.contextmanager
def _missing_means_bucket(bucket: str) -> Iterator[None]:
    """Explain "not found" in an upload, where only the bucket can be missing."""
    try:
        yield
    except FileNotFoundError:
        raise OSError(f"there is no bucket {bucket!r}; create it, or correct its name") from None
