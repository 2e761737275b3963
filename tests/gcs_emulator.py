"""A Google Cloud Storage server on loopback, with faults to inject, for tests and benchmarks.

The object model is PyPI's ``gcp-storage-emulator``. Around it stands what a data pipeline needs
and that package lacks: HTTP/1.1 with a thread per connection, uploads that keep every byte, ranges
and listings as the real service answers them, generations and preconditions. Nothing of the
installed package is changed. Objects live in memory.

``GcsEmulator`` runs the server as a process of its own, so that forked workers inherit none of its
sockets, its work counts against no benchmark, and it can be left to die with its parent::

    with GcsEmulator() as emulator:
        emulator.create_bucket("shards")
        os.environ.update(emulator.environment())
        emulator.inject(match=r"GET .*\\.tar", kind="503", probability=0.05)
        ...
        print(emulator.stats()["media_gets"])

Or by hand, until Ctrl-C: ``python tests/gcs_emulator.py --port 9023 --bucket shards``.
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
"""Where the requests of ``GcsEmulator`` itself go: never counted, delayed or failed."""

STATUS_FAULTS = ("503", "429", "500")
BODY_FAULTS = ("disconnect", "truncate", "stall")
DELAY_FAULTS = ("latency", "bandwidth")
FAULT_KINDS = STATUS_FAULTS + BODY_FAULTS + DELAY_FAULTS


@dataclass
class Fault:
    """What goes wrong, for which requests, how often: see ``GcsEmulator.inject``."""

    match: str
    kind: str
    probability: float = 1.0
    times: int | None = None
    seconds: float = 3600.0
    after_bytes: int = 0
    bytes_per_second: float = 0.0
    seed: int = 0
    dice: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"fault kind {self.kind!r} is none of {', '.join(FAULT_KINDS)}")
        re.compile(self.match)
        self.dice = random.Random(self.seed)

    def strikes(self, request_line: str) -> bool:
        """Whether it hits this request; counts down ``times`` if so."""
        if self.times == 0 or not re.search(self.match, request_line):
            return False
        if self.dice.random() >= self.probability:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class GcsEmulator:
    """The emulator in a process of its own; ``start`` and ``stop`` it, or use ``with``."""

    def __init__(self, port: int = 0, start_timeout: float = 30.0) -> None:
        self.url = ""
        self._port = port
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> GcsEmulator:
        """Start the server and wait until it answers."""
        command = [sys.executable, os.path.abspath(__file__), "--port", str(self._port)]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [*command, "--until-stdin-closes"],
                stdin=subprocess.PIPE,  # closes when this process dies, however it dies
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            late = threading.Timer(self._start_timeout, self._process.kill)
            late.start()
            assert self._process.stdout is not None
            self.url = self._process.stdout.readline().decode().strip()
            late.cancel()
            if not self.url:
                self.stop()
                errors.seek(0)
                raise RuntimeError(f"the emulator did not start:\n{errors.read().decode()}")
        return self

    def stop(self) -> None:
        """End the server; its objects are gone."""
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
        """The process of the server."""
        assert self._process is not None
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment so that its ``gs://`` is this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket; one that is there stays as it is."""
        self._control("POST", "buckets", {"name": name})

    def remove(self, bucket: str, prefix: str = "") -> None:
        """Delete every object in ``bucket`` whose name begins with ``prefix``, unseen."""
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
    ) -> None:
        """Make requests fail from now on.

        ``match`` is a regular expression searched in ``METHOD /path?query``, percent-decoded (a
        download: ``GET /download/storage/v1/b/shards/o/train/000.tar?alt=media``). Of those that
        match, each fails with ``probability`` (from a generator seeded with ``seed``), ``times``
        at most. Of several faults of the kinds that fail a request, the first to strike does.

        Kinds: ``503``, ``429``, ``500`` answer so and do nothing; ``disconnect`` does what was
        asked but cuts the connection ``after_bytes`` of the answer's body, before the answer if
        that is 0; ``stall`` pauses there for ``seconds``; ``truncate`` ends the body there as if
        it were whole; ``latency`` delays the request by ``seconds``; ``bandwidth`` sends the body
        at ``bytes_per_second``.
        """
        fault = Fault(match, kind, probability, times, seconds, after_bytes, bytes_per_second, seed)
        described = {k: v for k, v in asdict(fault).items() if k != "dice"}
        self._control("POST", "faults", described)

    def clear_faults(self) -> None:
        """No more faults; requests that are stalled go on."""
        self._control("DELETE", "faults")

    def set_latency(self, seconds: float) -> None:
        """Delay every request by so much."""
        self._control("POST", "latency", {"seconds": seconds})

    def set_bandwidth(self, bytes_per_second: float) -> None:
        """Send each answer's body at no more than this; 0 for no limit."""
        self._control("POST", "bandwidth", {"bytes_per_second": bytes_per_second})

    def stats(self) -> dict[str, Any]:
        """Counted since the start or ``reset``.

        ``requests`` by method, ``media_gets`` (downloads of an object or a range of one),
        ``bytes_out`` (of bodies sent), ``bytes_in``, and ``faults`` by kind.
        """
        return self._control("GET", "stats")

    def reset(self) -> None:
        """No faults, no latency, no limit of bandwidth, and the counters at zero."""
        self._control("POST", "reset")

    def cpu_seconds(self) -> float:
        """CPU time the server has used so far, for a benchmark to leave out."""
        return float(self._control("GET", "cpu")["seconds"])

    def _control(self, method: str, what: str, content: Any = None) -> dict[str, Any]:
        # http.client, for it heeds no proxy settings.
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, CONTROL + what, json.dumps(content))
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                raise RuntimeError(f"{method} {what}: {answer.status} {text}")
            return json.loads(text)


# From here on: what runs in the server's process.


class Answer(NamedTuple):
    """What goes back: the status, the body (a view where it is part of an object), headers."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


def json_answer(content: Any, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error_answer(status: int, message: str) -> Answer:
    """An error in the service's form."""
    return json_answer({"error": {"code": status, "message": message}}, status)


class Failed(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.answer = error_answer(status, message)


@dataclass
class Upload:
    """A resumable upload under way, or finished: then ``result`` is the object's resource."""

    bucket: str
    name: str
    content_type: str
    metadata: dict[str, Any]
    precondition: str | None
    received: bytearray = field(default_factory=bytearray)
    result: dict[str, Any] | None = None


class Service:
    """The objects, the faults, the counters: all that the connections share."""

    def __init__(self) -> None:
        from gcp_storage_emulator.storage import Storage

        class InMemory(Storage):
            def _write_config_to_file(self) -> None:
                """Nothing to keep: writing every object's metadata at each change is quadratic."""

        self.lock = threading.RLock()
        self.objects = InMemory(use_memory_fs=True)
        self.uploads: dict[str, Upload] = {}
        self.requests: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.cleared = threading.Event()  # set when the faults of its time are cleared
        self.latency = 0.0
        self.bandwidth = 0.0

    # Faults and counters

    def strike(self, request_line: str) -> list[Fault]:
        """The faults that hit this request: any delays, and at most one failure."""
        hits: list[Fault] = []
        with self.lock:
            for fault in self.faults:
                failed = any(hit.kind not in DELAY_FAULTS for hit in hits)
                if failed and fault.kind not in DELAY_FAULTS:
                    continue
                if fault.strikes(request_line):
                    hits.append(fault)
            self.struck.update(hit.kind for hit in hits)
        return hits

    def count(self, **amounts: int) -> None:
        """Add to the counters."""
        with self.lock:
            self.counters.update(amounts)

    def clear_faults(self) -> None:
        """Drop the faults and let go of what they hold up."""
        with self.lock:
            self.faults.clear()
            self.cleared.set()
            self.cleared = threading.Event()

    def control(self, method: str, what: str, content: Any) -> Any:
        """Do what a ``GcsEmulator`` asks."""
        from gcp_storage_emulator.handlers import buckets

        with self.lock:
            if (method, what) == ("GET", "stats"):
                names = ("media_gets", "bytes_out", "bytes_in")
                return {name: self.counters[name] for name in names} | {
                    "requests": dict(self.requests),
                    "faults": dict(self.struck),
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
                for counter in (self.requests, self.struck, self.counters):
                    counter.clear()
            elif (method, what) == ("POST", "buckets"):
                if buckets.create_bucket(content["name"], self.objects):
                    # What is deleted need not be kept for restoring: it would only eat memory.
                    policy = self.objects.buckets[content["name"]]["softDeletePolicy"]
                    policy["retentionDurationSeconds"] = "0"
            elif (method, what) == ("POST", "remove"):
                there = self.objects.objects.get(content["bucket"], {})
                for name in [name for name in there if name.startswith(content["prefix"])]:
                    self.objects.delete_file(content["bucket"], name)
            else:
                raise Failed(404, f"no control {method} {what}")
        return {}

    # Objects

    def resource(self, bucket: str, name: str) -> dict[str, Any] | None:
        """The object's metadata, if there is one."""
        found: dict[str, Any] | None = self.objects.objects.get(bucket, {}).get(name)
        return found

    def check(self, bucket: str, name: str, query: dict[str, str]) -> dict[str, Any] | None:
        """The object, after what the request demands of its generation."""
        with self.lock:
            found = self.resource(bucket, name)
        current = found["generation"] if found else "0"
        if query.get("ifGenerationMatch", current) != current:
            raise Failed(412, "conditionNotMet")
        if query.get("generation", current) != current:
            raise Failed(404, f"No such object: {bucket}/{name}#{query['generation']}")
        return found

    def content(self, bucket: str, name: str) -> bytes:
        """The object's bytes, not a copy of them."""
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
        """Put an object in place of what is there, if that is what ``precondition`` says."""
        from gcp_storage_emulator.exceptions import Conflict, NotFound
        from gcp_storage_emulator.handlers import objects

        made: dict[str, Any] = objects._make_object_resource(
            base_url, bucket, name, content_type, str(len(content)), metadata
        )
        try:
            objects._checksums(content, made)
            with self.lock:
                if precondition is not None:
                    self.check(bucket, name, {"ifGenerationMatch": precondition})
                self.objects.create_file(bucket, name, content, made)
        except Conflict as error:  # a checksum sent along that is not the content's
            raise Failed(400, str(error)) from error
        except NotFound as error:
            raise Failed(404, f"The specified bucket does not exist: {bucket}") from error
        return made

    def page(self, bucket: str, query: dict[str, str]) -> Answer:
        """One page of a listing, in order, objects and common prefixes counted together."""
        from gcp_storage_emulator.exceptions import BadRequest, NotFound

        with self.lock:
            try:
                found, prefixes = self.objects.get_file_list(
                    bucket, query.get("prefix"), query.get("delimiter"), query.get("matchGlob")
                )
            except NotFound as error:
                raise Failed(404, "The specified bucket does not exist.") from error
            except BadRequest as error:
                raise Failed(400, str(error)) from error
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
        most = min(int(query.get("maxResults", 1000)), 1000)
        listing = {
            "kind": "storage#objects",
            "items": [entry for _, entry in rows[:most] if entry is not None],
            "prefixes": [name for name, entry in rows[:most] if entry is None],
        }
        if len(rows) > most:
            listing["nextPageToken"] = base64.urlsafe_b64encode(rows[most - 1][0].encode()).decode()
        return json_answer(listing)

    def media(self, bucket: str, name: str, query: dict[str, str], asked: str | None) -> Answer:
        """An object's bytes, or the range of them that was ``asked`` for."""
        with self.lock:
            found = self.check(bucket, name, query)
            if found is None:
                raise Failed(404, f"No such object: {bucket}/{name}")
            content = memoryview(self.content(bucket, name))
        self.count(media_gets=1)
        headers = {
            "Content-Type": found.get("contentType") or "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": found["etag"],
            "X-Goog-Generation": found["generation"],
            "X-Goog-Stored-Content-Length": str(len(content)),
        }
        limits = re.fullmatch(r"\s*bytes=(\d*)-(\d*)\s*", asked or "")
        if not limits or not (limits[1] or limits[2]):
            hashes = [f"crc32c={found['crc32c']}"]
            if found.get("md5Hash"):
                hashes.append(f"md5={found['md5Hash']}")
            return Answer(200, content, headers | {"X-Goog-Hash": ",".join(hashes)})
        if limits[1]:
            start = int(limits[1])
            end = min(len(content), int(limits[2]) + 1) if limits[2] else len(content)
        else:  # the last so many bytes
            start, end = max(0, len(content) - int(limits[2])), len(content)
        if start >= end:
            unsatisfied = {"Content-Range": f"bytes */{len(content)}"}
            return Answer(416, b"Request range not satisfiable", unsatisfied)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return Answer(206, content[start:end], headers)

    def receive(self, base_url: str, session: str, sent: bytes, said: str) -> Answer:
        """A part of a resumable upload, or a question how far it has come.

        As in the real service, bytes that are there already may be sent again, and so may the
        part that finished the upload: whose answer is lost does just that.
        """
        with self.lock:
            upload = self.uploads.get(session)
            if upload is None:
                raise Failed(404, "No such upload")
            if upload.result is not None:
                return json_answer(upload.result)
            limits = re.fullmatch(r"bytes (?:(\d+)-(?:\d+|\*)|\*)/(\d+|\*)", said)
            if said and not limits:
                raise Failed(400, f"Content-Range: {said}")
            start = int(limits[1]) if limits and limits[1] else 0
            if start > len(upload.received):
                raise Failed(400, f"got {len(upload.received)} bytes, sent from {start}")
            upload.received += sent[len(upload.received) - start :]
            total = limits[2] if limits else str(len(upload.received))
            if total == "*" or len(upload.received) < int(total):
                if sent and total == "*" and len(sent) % (256 << 10):
                    raise Failed(400, "all parts but the last must be multiples of 256 KiB")
                last = len(upload.received) - 1
                return Answer(308, b"", {"Range": f"bytes=0-{last}"} if last >= 0 else {})
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
            return json_answer(upload.result)


def split_related(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """The metadata, the content type and the content of a one-request upload.

    Mail parsers take a trailing carriage return of the content for a part of the line end before
    the boundary; which of the two line ends the sender writes shows at the first boundary.
    """
    named = re.search(r'boundary="?([^";]+)"?', content_type)
    if named is None:
        raise Failed(400, "no boundary")
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
    # The last boundary, so that content that looks like one does no harm.
    end = body.rindex(between + b"--")
    found = re.search(r"(?im)^content-type:\s*([^\r\n]+)", head)
    kind = found[1].strip() if found else "application/octet-stream"
    return json.loads(metadata), kind, body[head_end + 2 * len(line_end) : end]


class Connection(BaseHTTPRequestHandler):
    """One client's connection, kept alive from request to request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Any method, despite the name."""
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
        self.faults = service.strike(f"{self.command} {unquote(self.path)}")
        delays = [fault.seconds for fault in self.faults if fault.kind == "latency"]
        if service.latency or delays:
            service.cleared.wait(service.latency + sum(delays))
        status = next((fault.kind for fault in self.faults if fault.kind in STATUS_FAULTS), None)
        if status is not None:
            self._send(error_answer(int(status), "injected"))
            return
        try:
            answer = self._answer(path, body)
        except Failed as failed:
            answer = failed.answer
        self._send(answer)

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

    def _control(self, what: str, body: bytes) -> Answer:
        try:
            done = self.server.service.control(self.command, what, json.loads(body or b"null"))
        except Failed as failed:
            return failed.answer
        except (KeyError, TypeError, ValueError) as error:
            return error_answer(400, repr(error))
        return json_answer(done)

    def _answer(self, path: str, body: bytes) -> Answer:
        """Find who answers: the service where the package falls short, else the package."""
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
            raise Failed(501, f"not emulated: {self.command} {path}")
        bucket = request.params.get("bucket_name", "")
        name = request.params.get("object_id", "")
        if handler is objects.insert:
            return self._insert(bucket, query, body)
        if handler is objects.xml_upload:
            kind = self.headers.get("Content-Type", "application/octet-stream")
            service.store(self._base_url(), bucket, name, body, kind)
            return Answer(200)
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
            answer = self.server.package.call(handler, request, service.objects)
            made = service.resource(bucket, name)
            if handler is objects.compose and made is not None:
                made.pop("md5Hash", None)  # the real service knows none of what it put together
                made["componentCount"] = len(json.loads(body)["sourceObjects"])
                return json_answer(made)
        return answer

    def _base_url(self) -> str:
        return f"http://{self.headers.get('Host', self.server.address)}"

    def _insert(self, bucket: str, query: dict[str, str], body: bytes) -> Answer:
        service = self.server.service
        kind = self.headers.get("Content-Type", "application/octet-stream")
        precondition = query.get("ifGenerationMatch")
        if query.get("uploadType") == "resumable":
            metadata = json.loads(body or b"{}")
            name = query.get("name") or metadata["name"]
            if bucket not in service.objects.buckets:
                raise Failed(404, "The specified bucket does not exist.")
            service.check(bucket, name, {k: query[k] for k in query if k == "ifGenerationMatch"})
            kind = self.headers.get("X-Upload-Content-Type", "application/octet-stream")
            with service.lock:
                session = f"{len(service.uploads)}-{time.time_ns()}"
                service.uploads[session] = Upload(bucket, name, kind, metadata, precondition)
            where = {"uploadType": "resumable", "name": name, "upload_id": session}
            path = f"{self._base_url()}/upload/storage/v1/b/{bucket}/o?{urlencode(where)}"
            return Answer(200, b"", {"Location": path})
        if query.get("uploadType") == "multipart":
            try:
                metadata, kind, content = split_related(kind, body)
            except (ValueError, IndexError) as error:
                raise Failed(400, f"not a multipart upload: {error!r}") from error
        elif query.get("uploadType") == "media":
            metadata, content = {}, body
        else:
            raise Failed(400, "uploadType")
        name = query.get("name") or metadata["name"]
        return json_answer(
            service.store(self._base_url(), bucket, name, content, kind, metadata, precondition)
        )

    def _upload_part(self, session: str, body: bytes) -> Answer:
        service = self.server.service
        if self.command == "DELETE":
            with service.lock:
                service.uploads.pop(session, None)
            return Answer(499)  # the service's word for an upload that was called off
        said = self.headers.get("Content-Range", "")
        return service.receive(self._base_url(), session, body, said)

    def _move(self, bucket: str, name: str, target: str) -> Answer:
        service = self.server.service
        with service.lock:
            found = service.resource(bucket, name)
            if found is None:
                raise Failed(404, f"No such object: {bucket}/{name}")
            made = service.store(
                self._base_url(), bucket, target, service.content(bucket, name),
                found["contentType"], found,
            )  # fmt: skip
            service.objects.delete_file(bucket, name)
        return json_answer(made)

    def _send(self, answer: Answer) -> None:
        """Send the answer, with what the faults do to its body."""
        failing = next((fault for fault in self.faults if fault.kind in BODY_FAULTS), None)
        body = memoryview(answer.body)
        if failing is not None and failing.kind == "truncate":
            body, failing = body[: failing.after_bytes], None
        if failing is not None and failing.after_bytes == 0:
            self._fail(failing)
            if failing.kind == "disconnect":
                return
            failing = None
        self.send_response(answer.status)
        for name, value in answer.headers.items():
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
        # Not close: it would leave the connection open while another process holds it.
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
    """What is used of ``gcp-storage-emulator``: its routes and handlers."""

    def __init__(self) -> None:
        from gcp_storage_emulator import server
        from gcp_storage_emulator.handlers import objects

        self._server = server
        self._insert = objects.insert
        self._routes = [(re.compile(pattern), by_method) for pattern, by_method in server.HANDLERS]

    def request(self, connection: Connection, body: bytes) -> Any:
        """The request in the package's form, its body read already."""
        request = self._server.Request(connection, connection.command)
        kind = connection.headers.get("Content-Type") or ""
        if kind.startswith("multipart/mixed"):
            connection.rfile, kept = _Replayed(body), connection.rfile
            request.data  # noqa: B018 (parses, and keeps what it parsed)
            connection.rfile = kept
        else:
            is_json = body and kind.startswith("application/json")
            request._data = json.loads(body) if is_json else body or None
        return request

    def route(self, request: Any, method: str) -> Callable[..., None] | None:
        """The handler for a request, which it learns the names in its path from."""
        for pattern, by_method in self._routes:
            match = pattern.fullmatch(request.path)
            if match:
                request.set_match(match)
                handler: Callable[..., None] | None = by_method.get(method)
                if handler is None and method == "POST" and "uploadType" in request.query:
                    return self._insert
                return handler
        return None

    def call(self, handler: Callable[..., None], request: Any, storage: Any) -> Answer:
        """Let one of the package's handlers answer."""
        response = self._server.Response(None)
        handler(request, response, storage)
        content = response._content
        body = content.encode() if isinstance(content, str) else content
        return Answer(int(response.status), body, response._headers)


class _Replayed:
    """A body that was read, to be read again."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self, length: int) -> bytes:
        return self._body


class Server(ThreadingHTTPServer):
    """Listens on loopback; each connection has its thread."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.service = Service()
        self.package = Package()
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=9023, help="0 takes any that is free")
    parser.add_argument("--bucket", action="append", default=[], help="make this bucket")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to each request")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="bytes per second and answer")
    parser.add_argument("--until-stdin-closes", action="store_true")
    options = parser.parse_args()
    server = Server(options.port)
    for bucket in options.bucket:
        server.service.control("POST", "buckets", {"name": bucket})
    server.service.latency, server.service.bandwidth = options.latency, options.bandwidth
    if options.until_stdin_closes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    print(f"http://{server.address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
