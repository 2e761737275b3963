"""An emulated Google Cloud Storage server with fault injection, for tests and benchmarks.

The object model is PyPI's ``gcp-storage-emulator``. This module adds what a data pipeline needs and
that package lacks: HTTP/1.1 with a thread per connection, uploads that keep every byte, ranges and
listings as in the real service, generations and preconditions. The installed package is not
modified. Objects are kept in memory.

``GcsEmulator`` runs the server in a separate process, so that forked workers do not inherit its
sockets, benchmarks do not measure its work, and it ends with its parent::

    with GcsEmulator() as emulator:
        emulator.create_bucket("shards")
        os.environ.update(emulator.environment())
        emulator.inject(match=r"GET .*\\.tar", kind="503", probability=0.05)
        ...
        print(emulator.stats()["media_gets"])

On the command line: ``python tests/helpers/gcs_emulator.py --port 9023 --bucket shards``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlencode, urlsplit

CONTROL = "/_control/"
"""Path prefix of the requests of ``GcsEmulator`` itself, which neither count nor fail."""

STATUS_FAULTS = ("503", "429", "500")
BODY_FAULTS = ("disconnect", "truncate", "stall")
DELAY_FAULTS = ("latency", "bandwidth")
FAULT_KINDS = STATUS_FAULTS + BODY_FAULTS + DELAY_FAULTS


@dataclass
class Fault:
    """A fault, the requests it applies to, and its frequency; see ``GcsEmulator.inject``."""

    match: str
    kind: str
    probability: float = 1.0
    times: int | None = None
    seconds: float = 3600.0
    after_bytes: int = 0
    bytes_per_second: float = 0.0
    seed: int = 0
    skip: int = 0
    dice: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"fault kind {self.kind!r} is not one of {', '.join(FAULT_KINDS)}")
        re.compile(self.match)
        self.dice = random.Random(self.seed)

    def applies_to(self, request_line: str) -> bool:
        """Return whether the fault applies to this request; if so, count down ``times``."""
        if self.times == 0 or not re.search(self.match, request_line):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.dice.random() >= self.probability:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class GcsEmulator:
    """The server in a separate process; use ``start`` and ``stop``, or a ``with`` statement."""

    def __init__(self, port: int = 0, start_timeout: float = 30.0) -> None:
        self.url = ""
        self._port = port
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> GcsEmulator:
        """Start the server, and wait until it responds."""
        command = [sys.executable, os.path.abspath(__file__), "--port", str(self._port)]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [*command, "--until-stdin-closes"],
                stdin=subprocess.PIPE,  # closes when this process ends for any reason
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            timer = threading.Timer(self._start_timeout, self._process.kill)
            timer.start()
            assert self._process.stdout is not None
            self.url = self._process.stdout.readline().decode().strip()
            timer.cancel()
            if not self.url:
                self.stop()
                errors.seek(0)
                raise RuntimeError(f"the emulator did not start:\n{errors.read().decode()}")
        return self

    def stop(self) -> None:
        """Stop the server and drop its objects."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None

    def __enter__(self) -> GcsEmulator:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which ``gs://`` means this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def create_bucket(self, name: str) -> None:
        """Create a bucket; an existing one is not changed."""
        self._control("POST", "buckets", {"name": name})

    def remove(self, bucket: str, prefix: str = "") -> None:
        """Delete all objects in ``bucket`` whose names begin with ``prefix``; not counted."""
        self._control("POST", "remove", {"bucket": bucket, "prefix": prefix})

    def inject(
        self,
        match: str = "",
        *,
        kind: str,
        probability: float = 1.0,
        times: int | None = None,
        seconds: float = 3600.0,
        after_bytes: int = 0,
        bytes_per_second: float = 0.0,
        seed: int = 0,
        skip: int = 0,
    ) -> None:
        """Make requests fail from now on.

        If several faults that fail a request apply to it, only the first has an effect.

        Args:
            match: regular expression to search for in ``METHOD /path?query``, percent-decoded (a
                download: ``GET /download/storage/v1/b/shards/o/train/000.tar?alt=media``).
            kind: ``503``, ``429`` and ``500`` respond with this status and do nothing.
                ``disconnect`` performs the request, but closes the connection after
                ``after_bytes`` of the response's body (if 0, before the response). ``stall`` pauses
                there for ``seconds``. ``truncate`` ends the body there as if it were complete.
                ``latency`` delays the request by ``seconds``. ``bandwidth`` sends the body at
                ``bytes_per_second``.
            probability: with which a matching request fails.
            times: maximum number of failures.
            seconds: see ``kind``.
            after_bytes: see ``kind``.
            bytes_per_second: see ``kind``.
            seed: of the generator for ``probability``.
            skip: number of matching requests that succeed before.
        """
        fault = Fault(
            match, kind, probability, times, seconds, after_bytes, bytes_per_second, seed, skip
        )
        fields = {k: v for k, v in asdict(fault).items() if k != "dice"}
        self._control("POST", "faults", fields)

    def clear_faults(self) -> None:
        """Remove all faults; stalled requests continue."""
        self._control("DELETE", "faults")

    def set_latency(self, seconds: float) -> None:
        """Delay every request."""
        self._control("POST", "latency", {"seconds": seconds})

    def set_bandwidth(self, bytes_per_second: float) -> None:
        """Limit the rate at which each response is sent; 0 means no limit."""
        self._control("POST", "bandwidth", {"bytes_per_second": bytes_per_second})

    def stats(self) -> dict[str, Any]:
        """Return the counters since the start or ``reset``.

        Returns:
            ``requests`` by method, ``media_gets`` (downloads of an object or a range of one),
            ``bytes_out`` and ``bytes_in`` of bodies, and ``faults`` by kind.
        """
        return self._control("GET", "stats")

    def reset(self) -> None:
        """Remove faults, latency and bandwidth limit, and reset the counters."""
        self._control("POST", "reset")

    def cpu_seconds(self) -> float:
        """Return the CPU time of the server, which a benchmark subtracts."""
        return float(self._control("GET", "cpu")["seconds"])

    def _control(self, method: str, what: str, content: Any = None) -> dict[str, Any]:
        # http.client, because it ignores proxy settings.
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, CONTROL + what, json.dumps(content))
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise RuntimeError(f"{method} {what}: {response.status} {text}")
            return json.loads(text)


# Everything below runs in the process of the server.


class Response(NamedTuple):
    """A response: status, body (a view if it is a part of an object) and headers."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


def json_response(content: Any, status: int = 200) -> Response:
    """Return a JSON response."""
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error_response(status: int, message: str) -> Response:
    """Return an error in the format of the service."""
    return json_response({"error": {"code": status, "message": message}}, status)


class RequestError(Exception):
    """Ends a request with an error response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.response = error_response(status, message)


@dataclass
class Upload:
    """A resumable upload; when it is finished, ``result`` is the metadata of the object."""

    bucket: str
    name: str
    content_type: str
    metadata: dict[str, Any]
    precondition: str | None
    received: bytearray = field(default_factory=bytearray)
    result: dict[str, Any] | None = None


class Service:
    """The objects, faults and counters, which all connections share."""

    def __init__(self) -> None:
        from gcp_storage_emulator.storage import Storage

        class InMemory(Storage):
            def _write_config_to_file(self) -> None:
                """Do nothing: writing the metadata of all objects at each change is quadratic."""

        self.lock = threading.RLock()
        self.objects = InMemory(use_memory_fs=True)
        self.uploads: dict[str, Upload] = {}
        self.requests: Counter[str] = Counter()
        self.applied: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.cleared = threading.Event()  # set when the current faults are cleared
        self.latency = 0.0
        self.bandwidth = 0.0

    # Faults and counters

    def apply_faults(self, request_line: str) -> list[Fault]:
        """Return the faults that apply to a request: any delays, and at most one failure."""
        hits: list[Fault] = []
        with self.lock:
            for fault in self.faults:
                failed = any(hit.kind not in DELAY_FAULTS for hit in hits)
                if failed and fault.kind not in DELAY_FAULTS:
                    continue
                if fault.applies_to(request_line):
                    hits.append(fault)
            self.applied.update(hit.kind for hit in hits)
        return hits

    def count(self, **amounts: int) -> None:
        """Add to the counters."""
        with self.lock:
            self.counters.update(amounts)

    def clear_faults(self) -> None:
        """Remove the faults, and release the requests that they delay."""
        with self.lock:
            self.faults.clear()
            self.cleared.set()
            self.cleared = threading.Event()

    def control(self, method: str, what: str, content: Any) -> Any:
        """Perform a request of ``GcsEmulator``."""
        from gcp_storage_emulator.handlers import buckets

        with self.lock:
            if (method, what) == ("GET", "stats"):
                names = ("media_gets", "bytes_out", "bytes_in")
                return {name: self.counters[name] for name in names} | {
                    "requests": dict(self.requests),
                    "faults": dict(self.applied),
                }
            if (method, what) == ("GET", "cpu"):
                return {"seconds": time.process_time()}
            if (method, what) == ("POST", "faults"):
                self.faults.append(Fault(**content))
            elif (method, what) == ("DELETE", "faults"):
                self.clear_faults()
            elif (method, what) == ("POST", "latency"):
                self.latency = content["seconds"]
            elif (method, what) == ("POST", "bandwidth"):
                self.bandwidth = content["bytes_per_second"]
            elif (method, what) == ("POST", "reset"):
                self.clear_faults()
                self.latency = self.bandwidth = 0.0
                for counter in (self.requests, self.applied, self.counters):
                    counter.clear()
            elif (method, what) == ("POST", "buckets"):
                if buckets.create_bucket(content["name"], self.objects):
                    # Deleted objects are not kept for restoring, which would only use memory.
                    policy = self.objects.buckets[content["name"]]["softDeletePolicy"]
                    policy["retentionDurationSeconds"] = "0"
            elif (method, what) == ("POST", "remove"):
                present = self.objects.objects.get(content["bucket"], {})
                for name in [name for name in present if name.startswith(content["prefix"])]:
                    self.objects.delete_file(content["bucket"], name)
            else:
                raise RequestError(404, f"no control {method} {what}")
        return {}

    # Objects

    def resource(self, bucket: str, name: str) -> dict[str, Any] | None:
        """Return the metadata of an object; None if it does not exist."""
        found: dict[str, Any] | None = self.objects.objects.get(bucket, {}).get(name)
        return found

    def check(self, bucket: str, name: str, query: dict[str, str]) -> dict[str, Any] | None:
        """Return the metadata of an object; raise if a request requires another generation."""
        with self.lock:
            found = self.resource(bucket, name)
        current = found["generation"] if found else "0"
        if query.get("ifGenerationMatch", current) != current:
            raise RequestError(412, "conditionNotMet")
        if query.get("generation", current) != current:
            raise RequestError(404, f"No such object: {bucket}/{name}#{query['generation']}")
        return found

    def content(self, bucket: str, name: str) -> bytes:
        """Return the bytes of an object, without a copy."""
        stored: bytes = self.objects.get_file(bucket, name)
        return stored

    def store(
        self,
        base_url: str,
        bucket: str,
        name: str,
        content: bytes,
        content_type: str,
        metadata: dict[str, Any] | None = None,
        precondition: str | None = None,
    ) -> dict[str, Any]:
        """Create or replace an object, if ``precondition`` matches its generation."""
        from gcp_storage_emulator.exceptions import Conflict, NotFound
        from gcp_storage_emulator.handlers import objects

        created: dict[str, Any] = objects._make_object_resource(
            base_url, bucket, name, content_type, str(len(content)), metadata
        )
        try:
            objects._checksums(content, created)
            with self.lock:
                if precondition is not None:
                    self.check(bucket, name, {"ifGenerationMatch": precondition})
                self.objects.create_file(bucket, name, content, created)
        except Conflict as error:  # the request has a checksum that does not match
            raise RequestError(400, str(error)) from error
        except NotFound as error:
            raise RequestError(404, f"The specified bucket does not exist: {bucket}") from error
        return created

    def page(self, bucket: str, query: dict[str, str]) -> Response:
        """Return one page of a listing: objects and common prefixes, sorted together."""
        from gcp_storage_emulator.exceptions import BadRequest, NotFound

        with self.lock:
            try:
                found, prefixes = self.objects.get_file_list(
                    bucket, query.get("prefix"), query.get("delimiter"), query.get("matchGlob")
                )
            except NotFound as error:
                raise RequestError(404, "The specified bucket does not exist.") from error
            except BadRequest as error:
                raise RequestError(400, str(error)) from error
        rows = sorted(
            [(entry["name"], entry) for entry in found] + [(prefix, None) for prefix in prefixes],
            key=lambda row: row[0],
        )
        token = query.get("pageToken")
        after = base64.urlsafe_b64decode(token).decode() if token else ""
        first, last = query.get("startOffset", ""), query.get("endOffset")
        rows = [
            (name, entry)
            for name, entry in rows
            if name > after and name >= first and (last is None or name < last)
        ]
        limit = min(int(query.get("maxResults", 1000)), 1000)
        listing = {
            "kind": "storage#objects",
            "items": [entry for _, entry in rows[:limit] if entry is not None],
            "prefixes": [name for name, entry in rows[:limit] if entry is None],
        }
        if len(rows) > limit:
            listing["nextPageToken"] = base64.urlsafe_b64encode(
                rows[limit - 1][0].encode()
            ).decode()
        return json_response(listing)

    def media(
        self, bucket: str, name: str, query: dict[str, str], byte_range: str | None
    ) -> Response:
        """Return an object, or a range of its bytes (the ``Range`` header)."""
        with self.lock:
            found = self.check(bucket, name, query)
            if found is None:
                raise RequestError(404, f"No such object: {bucket}/{name}")
            content = memoryview(self.content(bucket, name))
        self.count(media_gets=1)
        headers = {
            "Content-Type": found.get("contentType") or "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": found["etag"],
            "X-Goog-Generation": found["generation"],
            "X-Goog-Stored-Content-Length": str(len(content)),
        }
        limits = re.fullmatch(r"\s*bytes=(\d*)-(\d*)\s*", byte_range or "")
        if not limits or not (limits[1] or limits[2]):
            hashes = [f"crc32c={found['crc32c']}"]
            if found.get("md5Hash"):
                hashes.append(f"md5={found['md5Hash']}")
            return Response(200, content, headers | {"X-Goog-Hash": ",".join(hashes)})
        if limits[1]:
            start = int(limits[1])
            end = min(len(content), int(limits[2]) + 1) if limits[2] else len(content)
        else:  # the last bytes
            start, end = max(0, len(content) - int(limits[2])), len(content)
        if start >= end:
            unsatisfied = {"Content-Range": f"bytes */{len(content)}"}
            return Response(416, b"Request range not satisfiable", unsatisfied)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return Response(206, content[start:end], headers)

    def receive(self, base_url: str, session: str, sent: bytes, content_range: str) -> Response:
        """Handle a part of a resumable upload, or a request for its status.

        As in the real service, stored bytes may be sent again, and so may the part that finished
        the upload: a client does that after a lost response.
        """
        with self.lock:
            upload = self.uploads.get(session)
            if upload is None:
                raise RequestError(404, "No such upload")
            if upload.result is not None:
                return json_response(upload.result)
            limits = re.fullmatch(r"bytes (?:(\d+)-(?:\d+|\*)|\*)/(\d+|\*)", content_range)
            if content_range and not limits:
                raise RequestError(400, f"Content-Range: {content_range}")
            start = int(limits[1]) if limits and limits[1] else 0
            if start > len(upload.received):
                raise RequestError(400, f"got {len(upload.received)} bytes, sent from {start}")
            upload.received += sent[len(upload.received) - start :]
            total = limits[2] if limits else str(len(upload.received))
            if total == "*" or len(upload.received) < int(total):
                if sent and total == "*" and len(sent) % (256 << 10):
                    raise RequestError(400, "all parts but the last must be multiples of 256 KiB")
                last = len(upload.received) - 1
                return Response(308, b"", {"Range": f"bytes=0-{last}"} if last >= 0 else {})
            upload.result = self.store(
                base_url,
                upload.bucket,
                upload.name,
                bytes(upload.received),
                upload.content_type,
                upload.metadata,
                upload.precondition,
            )
            upload.received = bytearray()
            return json_response(upload.result)


def split_related(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """Return the metadata, the content type and the content of a multipart upload.

    A mail parser would take a trailing carriage return of the content as part of the line end
    before the boundary; the first boundary shows which line end the sender uses.
    """
    named = re.search(r'boundary="?([^";]+)"?', content_type)
    if named is None:
        raise RequestError(400, "no boundary")
    boundary = b"--" + named[1].encode()
    begin = body.index(boundary) + len(boundary)
    line_end = b"\r\n" if body[begin : begin + 2] == b"\r\n" else b"\n"
    between = line_end + boundary
    begin += len(line_end)
    middle = body.index(between, begin)
    metadata = body[begin:middle].split(2 * line_end, 1)[1]
    begin = middle + len(between) + len(line_end)
    head_end = body.index(2 * line_end, begin)
    head = body[begin:head_end].decode()
    # The last boundary, because the content may contain one.
    end = body.rindex(between + b"--")
    found = re.search(r"(?im)^content-type:\s*([^\r\n]+)", head)
    kind = found[1].strip() if found else "application/octet-stream"
    return json.loads(metadata), kind, body[head_end + 2 * len(line_end) : end]


class Connection(BaseHTTPRequestHandler):
    """A persistent connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log."""

    def do_GET(self) -> None:
        """Handle a request of any method, despite the name."""
        service = self.server.service
        self.faults: list[Fault] = []
        body = self._read_body()
        path = urlsplit(self.path).path
        if path.startswith(CONTROL):
            self._send(self._control(path[len(CONTROL) :], body))
            return
        with service.lock:
            service.requests[self.command] += 1
            service.counters["bytes_in"] += len(body)
        self.faults = service.apply_faults(f"{self.command} {unquote(self.path)}")
        delays = [fault.seconds for fault in self.faults if fault.kind == "latency"]
        if service.latency or delays:
            service.cleared.wait(service.latency + sum(delays))
        status = next((fault.kind for fault in self.faults if fault.kind in STATUS_FAULTS), None)
        if status is not None:
            self._send(error_response(int(status), "injected"))
            return
        try:
            response = self._respond(path, body)
        except RequestError as error:
            response = error.response
        self._send(response)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._read_chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _read_chunks(self) -> Iterator[bytes]:
        while length := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(length)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers

    def _control(self, what: str, body: bytes) -> Response:
        try:
            done = self.server.service.control(self.command, what, json.loads(body or b"null"))
        except RequestError as error:
            return error.response
        except (KeyError, TypeError, ValueError) as error:
            return error_response(400, repr(error))
        return json_response(done)

    def _respond(self, path: str, body: bytes) -> Response:
        """Respond with the package, or with ``Service`` where the package is not sufficient."""
        from gcp_storage_emulator.handlers import objects

        request = self.server.package.request(self, body)
        query = {key: values[-1] for key, values in request.query.items()}
        service = self.server.service
        moved = re.fullmatch(r"(?:/storage/v1)?/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path)
        if moved and self.command == "POST":
            return self._move(*(unquote(part) for part in moved.groups()))
        if "upload_id" in query:
            return self._upload_part(query["upload_id"], body)
        handler = self.server.package.route(request, self.command)
        if handler is None:
            raise RequestError(501, f"not emulated: {self.command} {path}")
        bucket = request.params.get("bucket_name", "")
        name = request.params.get("object_id", "")
        if handler is objects.insert:
            return self._insert(bucket, query, body)
        if handler is objects.xml_upload:
            kind = self.headers.get("Content-Type", "application/octet-stream")
            service.store(self._base_url(), bucket, name, body, kind)
            return Response(200)
        if handler is objects.download or (handler is objects.get and query.get("alt") == "media"):
            return service.media(bucket, name, query, self.headers.get("Range"))
        if handler is objects.ls:
            return service.page(bucket, query)
        with service.lock:
            if name:
                service.check(
                    request.params.get("dest_bucket_name", bucket),
                    request.params.get("dest_object_id", name),
                    query,
                )
            response = self.server.package.call(handler, request, service.objects)
            created = service.resource(bucket, name)
            if handler is objects.compose and created is not None:
                created.pop("md5Hash", None)  # as in the real service: composite objects have none
                created["componentCount"] = len(json.loads(body)["sourceObjects"])
                return json_response(created)
        return response

    def _base_url(self) -> str:
        return f"http://{self.headers.get('Host', self.server.address)}"

    def _insert(self, bucket: str, query: dict[str, str], body: bytes) -> Response:
        service = self.server.service
        kind = self.headers.get("Content-Type", "application/octet-stream")
        precondition = query.get("ifGenerationMatch")
        if query.get("uploadType") == "resumable":
            metadata = json.loads(body or b"{}")
            name = query.get("name") or metadata["name"]
            if bucket not in service.objects.buckets:
                raise RequestError(404, "The specified bucket does not exist.")
            service.check(bucket, name, {k: query[k] for k in query if k == "ifGenerationMatch"})
            kind = self.headers.get("X-Upload-Content-Type", "application/octet-stream")
            with service.lock:
                session = f"{len(service.uploads)}-{time.time_ns()}"
                service.uploads[session] = Upload(bucket, name, kind, metadata, precondition)
            where = {"uploadType": "resumable", "name": name, "upload_id": session}
            path = f"{self._base_url()}/upload/storage/v1/b/{bucket}/o?{urlencode(where)}"
            return Response(200, b"", {"Location": path})
        if query.get("uploadType") == "multipart":
            try:
                metadata, kind, content = split_related(kind, body)
            except (ValueError, IndexError) as error:
                raise RequestError(400, f"not a multipart upload: {error!r}") from error
        elif query.get("uploadType") == "media":
            metadata, content = {}, body
        else:
            raise RequestError(400, "uploadType")
        name = query.get("name") or metadata["name"]
        return json_response(
            service.store(self._base_url(), bucket, name, content, kind, metadata, precondition)
        )

    def _upload_part(self, session: str, body: bytes) -> Response:
        service = self.server.service
        if self.command == "DELETE":
            with service.lock:
                service.uploads.pop(session, None)
            return Response(499)  # the status of the real service for a cancelled upload
        content_range = self.headers.get("Content-Range", "")
        return service.receive(self._base_url(), session, body, content_range)

    def _move(self, bucket: str, name: str, target: str) -> Response:
        service = self.server.service
        with service.lock:
            found = service.resource(bucket, name)
            if found is None:
                raise RequestError(404, f"No such object: {bucket}/{name}")
            created = service.store(
                self._base_url(), bucket, target, service.content(bucket, name),
                found["contentType"], found,
            )  # fmt: skip
            service.objects.delete_file(bucket, name)
        return json_response(created)

    def _send(self, response: Response) -> None:
        """Send a response, with the faults that apply to its body."""
        failing = next((fault for fault in self.faults if fault.kind in BODY_FAULTS), None)
        body = memoryview(response.body)
        if failing is not None and failing.kind == "truncate":
            body, failing = body[: failing.after_bytes], None
        if failing is not None and failing.after_bytes == 0:
            self._fail(failing)
            if failing.kind == "disconnect":
                return
            failing = None
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if failing is None:
            self._write(body)
            return
        self._write(body[: failing.after_bytes])
        self._fail(failing)
        if failing.kind == "stall":
            self._write(body[failing.after_bytes :])

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "stall":
            self.server.service.cleared.wait(fault.seconds)
            return
        self.close_connection = True
        # Not close, which has no effect while another process holds the connection.
        self.connection.shutdown(socket.SHUT_RDWR)

    def _write(self, body: memoryview) -> None:
        service = self.server.service
        limits = [fault.bytes_per_second for fault in self.faults if fault.kind == "bandwidth"]
        limits += [service.bandwidth] if service.bandwidth else []
        step = 64 << 10 if limits else len(body)
        begin = time.monotonic()
        for at in range(0, len(body), step or 1):
            part = body[at : at + step]
            self.wfile.write(part)
            service.count(bytes_out=len(part))
            if limits:
                due = begin + (at + len(part)) / min(limits)
                service.cleared.wait(max(0.0, due - time.monotonic()))


class Package:
    """The routes and handlers of ``gcp-storage-emulator``."""

    def __init__(self) -> None:
        from gcp_storage_emulator import server
        from gcp_storage_emulator.handlers import objects

        self._server = server
        self._insert = objects.insert
        self._routes = [(re.compile(pattern), by_method) for pattern, by_method in server.HANDLERS]

    def request(self, connection: Connection, body: bytes) -> Any:
        """Return a request of the package, with a body that was read already."""
        request = self._server.Request(connection, connection.command)
        kind = connection.headers.get("Content-Type") or ""
        if kind.startswith("multipart/mixed"):
            connection.rfile, kept = _Replayed(body), connection.rfile
            request.data  # noqa: B018 (parses, and keeps the result)
            connection.rfile = kept
        else:
            is_json = body and kind.startswith("application/json")
            request._data = json.loads(body) if is_json else body or None
        return request

    def route(self, request: Any, method: str) -> Callable[..., None] | None:
        """Return the handler of a request, and store the names in its path in the request."""
        for pattern, by_method in self._routes:
            match = pattern.fullmatch(request.path)
            if match:
                request.set_match(match)
                handler: Callable[..., None] | None = by_method.get(method)
                if handler is None and method == "POST" and "uploadType" in request.query:
                    return self._insert
                return handler
        return None

    def call(self, handler: Callable[..., None], request: Any, storage: Any) -> Response:
        """Call a handler of the package and return its response."""
        response = self._server.Response(None)
        handler(request, response, storage)
        content = response._content
        body = content.encode() if isinstance(content, str) else content
        return Response(int(response.status), body, response._headers)


class _Replayed:
    """A file that returns a body that was read already."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self, length: int) -> bytes:
        return self._body


class Server(ThreadingHTTPServer):
    """Listens on the loopback interface, with a thread for each connection."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.service = Service()
        self.package = Package()
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=9023, help="0: any free port")
    parser.add_argument("--bucket", action="append", default=[], help="create this bucket")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to each request")
    parser.add_argument(
        "--bandwidth", type=float, default=0.0, help="bytes per second of a response"
    )
    parser.add_argument("--until-stdin-closes", action="store_true")
    options = parser.parse_args()
    server = Server(options.port)
    for bucket in options.bucket:
        server.service.control("POST", "buckets", {"name": bucket})
    server.service.latency, server.service.bandwidth = options.latency, options.bandwidth
    if options.until_stdin_closes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    print(f"http://{server.address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
