"""Google Cloud Storage: gcsfs speaks to it; how long to wait and when to try again is decided here.

What may pass (a bucket that is overloaded, a connection that breaks or falls silent, a body cut
short) is tried again, with growing waits, for about a minute; the number of gcsfs's own retries is
fixed, and six stalls in a row would take it 150 seconds. The environment decides:

- ``RAE_XLA_GCS_TIMEOUT``: seconds without a byte after which an answer from a bucket counts as
  lost; 20 if not given. The other times of waiting and trying again are in proportion to it.
- ``STORAGE_EMULATOR_HOST``: a server that stands in for Google's; it is sent no credentials.

``storage`` is what the rest of the system asks; nothing else imports this.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, BinaryIO, cast

from rae_xla.errors import UserError

READ_AHEAD = 16 << 20
"""Bytes: the read-ahead block at which streaming a tar over gcsfs is no longer request-bound."""

UPLOAD_PART = 16 << 20
"""Bytes sent to a bucket in one request, and held in memory until they are."""


def file_system(path: str) -> tuple[Any, str]:
    """gcsfs's file system for ``path`` (``gs://…``), and the path inside it.

    Raises:
        OSError: there is no way to it.
    """
    timeout = _timeout()
    with naming(path):
        files = _gcs(emulator(), timeout, os.getpid())
    return files, files._strip_protocol(path)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Whatever the libraries raise inside is an ``OSError`` that names ``path``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except Exception as error:
        if getattr(error, "code", None) == 401:
            raise PermissionError(
                f"{path}: {error}. Set up credentials: gcloud auth application-default login"
            ) from error
        raise OSError(f"{path}: {str(error) or type(error).__name__}") from error


def open_read(path: str) -> BinaryIO:
    """Open an object for reading from front to back, ``READ_AHEAD`` bytes a request."""
    return cast(BinaryIO, io.BufferedReader(_ObjectReader(path), 1 << 20))


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
    """Write an object that is there, whole, when the block ends; after an exception it never is."""
    writer = _ObjectWriter(path)
    try:
        yield cast(BinaryIO, writer)
        writer.finish()
    except BaseException:
        with contextlib.suppress(Exception):
            writer.discard()
        raise


def emulator() -> str | None:
    """The URL that ``STORAGE_EMULATOR_HOST`` gives, if it gives one."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if host in ("", "default"):
        return None
    return host if "://" in host else f"http://{host}"


def _timeout() -> float:
    """Seconds without a byte after which an answer counts as lost."""
    given = os.environ.get("RAE_XLA_GCS_TIMEOUT", "20")
    with contextlib.suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise UserError(f"RAE_XLA_GCS_TIMEOUT={given} is not a number of seconds; leave it out for 20")


@functools.lru_cache
def _gcs(endpoint: str | None, timeout: float, process: int) -> Any:
    """The file system of ``gs://``; one for each ``process``, for forks share no threads."""
    files = _gcs_class()
    import aiohttp
    from google.auth.exceptions import DefaultCredentialsError

    options = {
        "endpoint_url": endpoint,
        "requests_timeout": aiohttp.ClientTimeout(
            total=None, sock_connect=timeout / 2, sock_read=timeout
        ),
        "use_listings_cache": False,  # other hosts write, too
    }
    if endpoint is None:
        # Buckets that are open to all can be read without credentials.
        with contextlib.suppress(DefaultCredentialsError):
            return files(token="google_default", **options)
    return files(token="anon", **options)


@functools.cache
def _gcs_class() -> Any:
    """gcsfs's file system, with retries of our own in place of its own."""
    # Must stand before gcsfs is imported: the look-up of the bucket's type it turns off costs
    # a request per operation, and blocks for a minute where the account may not make it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    decorated = gcsfs.GCSFileSystem._request
    # Were it decorated no more, our retries would come on top of its own.
    request_once = getattr(decorated, "__wrapped__", decorated)

    class Files(gcsfs.GCSFileSystem):
        async def _request(
            self, *args: Any, headers: Any = None, data: Any = None, **options: Any
        ) -> Any:
            timeout = self.requests_timeout.sock_read

            async def attempt() -> Any:
                send = functools.partial(request_once, self, *args, headers=headers, **options)
                answer = await (send() if data is None else _sending(send, data, timeout))
                _check_whole((headers or {}).get("Range"), answer[1], answer[3])
                return answer

            return await _retried(attempt, timeout)

    return Files


async def _retried(attempt: Callable[[], Awaitable[Any]], timeout: float) -> Any:
    """Try until it succeeds, fails for good, or enough time has gone by.

    Three tries at least, however long they take: even where every one of them waits for its
    timeout, that is little more than a minute with the timeout of 20 seconds.
    """
    begin, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return await attempt()
        except Exception as error:
            if not _passes(error):
                raise
            passed = time.monotonic() - begin
            # Random, so that hosts which failed together do not come back together.
            if passed > timeout / 4:
                _tell(error, passed)
            wait = random.uniform(0.5, 1) * min(timeout / 20 * 2 ** (tries - 1), timeout / 2)
            if tries >= 3 and passed + wait > 2 * timeout:
                told = str(error) or type(error).__name__
                raise OSError(f"{told} (tried {tries} times in {passed:.0f} s)") from error
            await asyncio.sleep(wait)


_told = 0.0


def _tell(error: Exception, passed: float) -> None:
    """Say that something is being waited for; not for each of many requests."""
    global _told
    if time.monotonic() > _told + 30:
        _told = time.monotonic()
        logging.getLogger(__name__).warning(
            "gs://: no success for %.0f s (%s); trying again", passed, error or type(error).__name__
        )


async def _sending(send: Callable[..., Awaitable[Any]], data: Any, timeout: float) -> Any:
    """Send ``data`` in a request, which fails once none of it has gone out for ``timeout``.

    aiohttp's own timeout starts when all of it has gone out, which may be never.
    """
    watched = _WatchedBytes(data, timeout)
    request = asyncio.ensure_future(send(data=watched))
    try:
        while True:
            done, _ = await asyncio.wait([request], timeout=timeout / 4)
            if done:
                return request.result()
            if time.monotonic() > watched.deadline:
                raise TimeoutError(f"nothing could be sent for {timeout:g} s")
    finally:
        request.cancel()


class _WatchedBytes(io.BytesIO):
    """Bytes being sent; by the ``deadline`` more must have been taken, or the answer be there."""

    def __init__(self, data: Any, timeout: float) -> None:
        super().__init__(data)
        self._timeout, self._size = timeout, len(data)
        self.deadline = time.monotonic() + timeout

    def read(self, size: int | None = -1) -> bytes:
        self.deadline = time.monotonic() + self._timeout
        piece = super().read(size)
        if self.tell() == self._size:
            self.deadline += self._timeout  # the last piece must go out, and the answer come
        return piece


def _passes(error: Exception) -> bool:
    """Whether another try may succeed."""
    from gcsfs.retry import is_retriable
    from google.auth.exceptions import TransportError

    return is_retriable(error) or isinstance(
        error, (_CutShortError, ConnectionError, TimeoutError, asyncio.TimeoutError, TransportError)
    )


class _CutShortError(OSError):
    """An answer that ends before its end, and does not look like it."""


def _check_whole(asked: str | None, headers: Any, content: bytes) -> None:
    """Compare the length of an answer to ``asked`` (``bytes=first-last``) with what it must be."""
    given = headers.get("Content-Range")
    if asked is None or given is None:
        return
    first, _, last = asked.removeprefix("bytes=").partition("-")
    expected = min(int(last) + 1, _whole_size(given)) - int(first)
    if len(content) != expected:
        raise _CutShortError(f"{len(content)} bytes came of {expected} ({asked})")


def _whole_size(content_range: str) -> int:
    """Bytes of the object of which an answer with this ``Content-Range`` is a part."""
    return int(content_range.rpartition("/")[2])


def read_object(
    path: str, start: int, length: int, generation: str | None
) -> tuple[bytes, int, str | None]:
    """A range of a bucket's object; the size of the whole object and its generation."""
    files, inside = file_system(path)
    if length <= 0:
        return b"", start, generation
    with naming(path):
        try:
            headers, content = files.call(
                "GET",
                files.url(inside, generation=generation),
                headers={"Range": f"bytes={start}-{start + length - 1}"},
            )
        except Exception as error:
            if getattr(error, "code", None) != 416:
                raise
            return b"", start, generation  # it ends at ``start`` or before
        if "Content-Range" not in headers:
            raise OSError("gave no part of itself; is it stored with Content-Encoding: gzip?")
    return content, _whole_size(headers["Content-Range"]), headers.get("X-Goog-Generation")


class _ObjectReader(io.RawIOBase):
    """Reads a bucket's object from front to back, ``READ_AHEAD`` bytes a request."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._end, self._size, self._generation = 0, 1, cast("str | None", None)
        self._block = memoryview(b"")
        self._fetch()  # what is missing is found out at once

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block and self._end < self._size:
            self._fetch()
        wanted = min(len(buffer), len(self._block))
        buffer[:wanted] = self._block[:wanted]
        self._block = self._block[wanted:]
        return wanted

    def readall(self) -> bytes:
        blocks = [self._block]
        while self._end < self._size:
            self._fetch()
            blocks.append(self._block)
        self._block = memoryview(b"")
        return b"".join(blocks)

    def _fetch(self) -> None:
        content, self._size, generation = read_object(
            self._path, self._end, READ_AHEAD, self._generation
        )
        self._generation = self._generation or generation
        self._block = memoryview(content)
        self._end += len(content)


@contextlib.contextmanager
def _bucket_must_exist(bucket: str) -> Iterator[None]:
    """What can be missing when something is written is the bucket alone."""
    try:
        yield
    except FileNotFoundError:
        raise OSError(f"there is no bucket {bucket!r}; make it, or correct its name") from None


class _ObjectWriter(io.RawIOBase):
    """Writes a bucket's object, which is there, whole, after ``finish`` and not before.

    gcsfs's own writer is not used: a part that cannot be sent leaves views of its buffer in the
    traceback, and Python 3.12.1 crashes when it collects those as garbage.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._files, inside = file_system(path)
        self._bucket, self._name, _ = self._files.split_path(inside)
        self._url = f"{self._files._location}/upload/storage/v1/b/{self._bucket}/o"
        self._session: str | None = None
        self._sent = 0
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._sent + len(self._waiting)

    def write(self, content: Any) -> int:
        self._waiting += content
        while len(self._waiting) > UPLOAD_PART:
            self._send_part(UPLOAD_PART, "*")
        return memoryview(content).nbytes

    def finish(self) -> None:
        """Send the rest and make it an object."""
        if self._session is None:
            options = {"uploadType": "media", "name": self._name}
            self._call("POST", self._url, data=bytes(self._waiting), **options)
            return
        total = self.tell()
        # It was more than a part, so something waits; the service may want some of it again.
        while self._waiting:
            self._send_part(len(self._waiting), total)

    def discard(self) -> None:
        """Forget what was written."""
        if self._session is not None:
            # Uploads that nobody ends expire: no reason to wait for a bucket that is gone.
            self._call("DELETE", self._session, timeout=_timeout() / 4)

    def _send_part(self, length: int, total: int | str) -> None:
        if self._session is None:
            options = {"uploadType": "resumable", "name": self._name}
            self._session = self._call("POST", self._url, json={}, **options)[0]["Location"]
        part = bytes(self._waiting[:length])
        said = {"Content-Range": f"bytes {self._sent}-{self._sent + length - 1}/{total}"}
        headers, finished = self._call("PUT", self._session, headers=said, data=part)
        if finished:  # the object's description
            kept = length
        else:  # what is there of all that was sent, as in bytes=0-99
            kept = (
                int(headers["Range"].rpartition("-")[2]) + 1 - self._sent
                if "Range" in headers
                else 0
            )
        if not 0 < kept <= length:
            raise OSError(f"{self._path}: the upload was broken off")
        del self._waiting[:kept]
        self._sent += kept

    def _call(self, method: str, url: str, **options: Any) -> tuple[Any, bytes]:
        with naming(self._path), _bucket_must_exist(self._bucket):
            return cast("tuple[Any, bytes]", self._files.call(method, url, **options))
