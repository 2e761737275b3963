"""The gcsfs client for ``gs://``, with time limits and retries of our own.

Transient failures (an overloaded bucket, a broken or silent connection, a truncated response) are
retried with growing pauses for about a minute. gcsfs's own retries are not used: their number is
fixed, and six stalls in a row would take 150 seconds. Two environment variables are read:

- ``RAE_XLA_GCS_TIMEOUT``: seconds without a byte after which a request has failed; default 20. The
  other time limits and pauses are proportional to it.
- ``STORAGE_EMULATOR_HOST``: a server to use instead of Google's; it receives no credentials.

The only module that uses private names of gcsfs (2026.10.1): ``_request``, whose retries are
replaced; ``_location``, for our own uploads (see ``gcs``); ``_strip_protocol``, of fsspec.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 20.0
"""Seconds; see ``RAE_XLA_GCS_TIMEOUT``."""

WARNING_INTERVAL = 30.0
"""Seconds between two warnings about retries, of which there may be thousands."""


def client(timeout: float) -> Any:
    """Return gcsfs's file system for the current environment and process.

    Args:
        timeout: seconds without a byte after which a request has failed.
    """
    return _client(emulator_url(), timeout, os.getpid())


def path_within(files: Any, path: str) -> str:
    """Return ``bucket/name`` for a path ``gs://bucket/name``."""
    return str(files._strip_protocol(path))


def upload_url(files: Any, bucket: str) -> str:
    """Return the URL to which objects of a bucket are uploaded."""
    return f"{files._location}/upload/storage/v1/b/{bucket}/o"


def emulator_url() -> str | None:
    """Return the URL in ``STORAGE_EMULATOR_HOST``, or None if it is not set."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if host in ("", "default"):
        return None
    return host if "://" in host else f"http://{host}"


def timeout_seconds() -> float:
    """Return the seconds without a byte after which a request has failed.

    Raises:
        UserError: ``RAE_XLA_GCS_TIMEOUT`` is not a number of seconds.
    """
    value = os.environ.get("RAE_XLA_GCS_TIMEOUT", str(DEFAULT_TIMEOUT))
    with contextlib.suppress(ValueError):
        if 0 < float(value) < math.inf:
            return float(value)
    raise UserError(
        f"RAE_XLA_GCS_TIMEOUT={value} is not a number of seconds; unset it for the default of "
        f"{DEFAULT_TIMEOUT:g}"
    )


@functools.lru_cache
def _client(endpoint: str | None, timeout: float, process: int) -> Any:
    """Create a client; every ``process`` needs its own, because forks do not share threads."""
    files = _client_class()
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
        # Public buckets can be read without credentials.
        with contextlib.suppress(DefaultCredentialsError):
            return files(token="google_default", **options)
    return files(token="anon", **options)


@functools.cache
def _client_class() -> Any:
    """Return a subclass of gcsfs's file system that retries with ``Retrier``."""
    # Must be set before gcsfs is imported. It disables a look-up of the bucket's type, which costs
    # one request per operation and blocks for a minute where the account may not make it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    decorated = gcsfs.GCSFileSystem._request
    # Without the decorator; if gcsfs drops it, our retries are added to its own.
    request_once = getattr(decorated, "__wrapped__", decorated)

    class Client(gcsfs.GCSFileSystem):
        @functools.cached_property
        def _retrier(self) -> Retrier:
            return Retrier(self.requests_timeout.sock_read)

        async def _request(
            self, *args: Any, headers: Any = None, data: Any = None, **options: Any
        ) -> Any:
            timeout = self.requests_timeout.sock_read

            async def attempt() -> Any:
                send = functools.partial(request_once, self, *args, headers=headers, **options)
                response = await (send() if data is None else _upload(send, data, timeout))
                _check_length((headers or {}).get("Range"), response[1], response[3])
                return response

            return await self._retrier.run(attempt)

    return Client


class Retrier:
    """Repeats requests until they succeed, fail permanently, or run out of time.

    Args:
        timeout: seconds without a byte after which one attempt has failed.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._last_warning = -math.inf

    async def run(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Await ``attempt()`` until it succeeds.

        There are at least three attempts, however long they take: even if each of them ends in a
        timeout of 20 seconds, that is little more than a minute.

        Raises:
            ConnectionError: the attempts took too long; its message has the last error.
        """
        timeout = self._timeout
        start, attempts = time.monotonic(), 0
        while True:
            attempts += 1
            try:
                return await attempt()
            except Exception as error:
                if not _is_transient(error):
                    raise
                elapsed = time.monotonic() - start
                if elapsed > timeout / 4:
                    self._warn(error, elapsed)
                # Random, so that hosts that failed together do not come back together.
                pause = random.uniform(0.5, 1) * min(
                    timeout / 20 * 2 ** (attempts - 1), timeout / 2
                )
                if attempts >= 3 and elapsed + pause > 2 * timeout:
                    message = str(error) or type(error).__name__
                    raise ConnectionError(
                        f"{message} (tried {attempts} times in {elapsed:.0f} s)"
                    ) from error
                await asyncio.sleep(pause)

    def _warn(self, error: Exception, elapsed: float) -> None:
        if time.monotonic() < self._last_warning + WARNING_INTERVAL:
            return
        self._last_warning = time.monotonic()
        logger.warning(
            "gs://: no success for %.0f s (%s); trying again",
            elapsed,
            str(error) or type(error).__name__,
        )


async def _upload(send: Callable[..., Awaitable[Any]], data: Any, timeout: float) -> Any:
    """Send a request with a body; fail once none of the body was sent for ``timeout`` seconds.

    aiohttp's own timeout starts after the complete body was sent, which may never happen.
    """
    body = _WatchedBytes(data, timeout)
    request = asyncio.ensure_future(send(data=body))
    try:
        while True:
            done, _ = await asyncio.wait([request], timeout=timeout / 4)
            if done:
                return request.result()
            if time.monotonic() > body.deadline:
                raise TimeoutError(f"nothing could be sent for {timeout:g} s")
    finally:
        request.cancel()


class _WatchedBytes(io.BytesIO):
    """The body of a request, with the time by which the client must have taken more of it."""

    def __init__(self, data: Any, timeout: float) -> None:
        super().__init__(data)
        self._timeout, self._size = timeout, len(data)
        self.deadline = time.monotonic() + timeout

    def read(self, size: int | None = -1) -> bytes:
        self.deadline = time.monotonic() + self._timeout
        chunk = super().read(size)
        if self.tell() == self._size:
            self.deadline += self._timeout  # time to send the last chunk and to get the response
        return chunk


def _is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    from gcsfs.retry import is_retriable
    from google.auth.exceptions import TransportError

    transient = (ConnectionError, TimeoutError, asyncio.TimeoutError, TransportError)
    return is_retriable(error) or isinstance(error, (_TruncatedResponseError, *transient))


class _TruncatedResponseError(OSError):
    """A response is shorter than its headers declare, which aiohttp does not detect."""


def _check_length(requested: str | None, headers: Any, content: bytes) -> None:
    """Raise if a response to the range ``requested`` (``bytes=first-last``) is truncated."""
    content_range = headers.get("Content-Range")
    if requested is None or content_range is None:
        return
    first, _, last = requested.removeprefix("bytes=").partition("-")
    expected = min(int(last) + 1, object_size(content_range)) - int(first)
    if len(content) != expected:
        raise _TruncatedResponseError(f"received {len(content)} of {expected} bytes ({requested})")


def object_size(content_range: str) -> int:
    """Return the size of an object from the ``Content-Range`` header of a part of it."""
    return int(content_range.rpartition("/")[2])
