"""HTTP server of the page.

The standard library's server, because the page has six routes and a few visitors: a framework would
add packages to every installation.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
from functools import partial
from http import HTTPStatus
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rae_xla.errors import UserError
from rae_xla.tools.serve.jobs import Jobs, Request
from rae_xla.tools.serve.models import ServedModel

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 18
"""Bytes of a request: a prompt that is too long is answered, a flood is not read."""

MAX_DISCARDED = 1 << 24
"""Bytes of a longer request that are read and discarded."""

_COOKIE = "rae_xla_token"
_IMAGE = re.compile(r"/images/([0-9a-f]{32})/(\d{1,3})\.png")
_MANIFEST = re.compile(r"/manifests/([0-9a-f]{32})\.json")
_JOB = re.compile(r"/jobs/([0-9a-f]{32})")
_PAGE_FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
_PAGE_FILES["/page.css"] = ("page.css", "text/css")
# Nothing on the page may come from elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
)


def check_host(host: str, token: str | None) -> None:
    """Raise unless the page may be offered on an address.

    Args:
        host: address or name to listen on.
        token: that visitors must give; None: none.

    Raises:
        UserError: the address is reachable from other machines and there is no token.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UserError(f"--host {host} is not an address of this machine: {error}") from error
    if all(ipaddress.ip_address(str(a).partition("%")[0]).is_loopback for a in found):
        return
    if token is None or len(token) < 8:
        raise UserError(
            f"--host {host} can be reached from other machines: give --token with at least 8 "
            "characters, which visitors add to the address as ?token=..., or leave out --host"
        )


def make_server(
    host: str, port: int, model: ServedModel, jobs: Jobs, token: str | None = None
) -> ThreadingHTTPServer:
    """Return a server that listens; ``serve_forever`` answers.

    Args:
        host: address to listen on.
        port: 0: any free one.
        model: shown on the page.
        jobs: the queue of requests.
        token: that visitors must give; None: none.

    Raises:
        UserError: the port is in use, or not allowed.
    """
    handler = partial(_Handler, model=model, jobs=jobs, token=token)
    kind = _Server6 if ":" in host else _Server
    try:
        return kind((host, port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}): choose another --port, or 0 for any"
        ) from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True  # a port is free as soon as the server has ended


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "rae-xla"
    timeout = 60  # seconds for a request to arrive

    def __init__(
        self, *args: Any, model: ServedModel, jobs: Jobs, token: str | None, **options: Any
    ) -> None:
        self._model, self._jobs, self._token = model, jobs, token
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self._is_allowed(parse_qs(url.query)):
            return
        if url.path in _PAGE_FILES:
            name, kind = _PAGE_FILES[url.path]
            content = files("rae_xla.tools.serve").joinpath(name).read_bytes()
            self._send(content, f"{kind}; charset=utf-8")
        elif url.path == "/model":
            shown = {k: getattr(self._model, k) for k in ("name", "kind", "defaults")}
            self._send_json(shown)
        elif url.path == "/favicon.ico":
            self._send(b"", "image/x-icon", HTTPStatus.NO_CONTENT)
        elif match := _JOB.fullmatch(url.path):
            job = self._jobs.find(match[1])
            self._missing() if job is None else self._send_json(self._jobs.status(job))
        elif match := _IMAGE.fullmatch(url.path):
            job = self._jobs.find(match[1])
            if job is None or int(match[2]) >= len(job.images):
                self._missing()
            else:
                self._send(job.images[int(match[2])], "image/png")
        elif match := _MANIFEST.fullmatch(url.path):
            job = self._jobs.find(match[1])
            if job is None:
                self._missing()
            else:
                self._send(self._jobs.manifest(job), "application/json")
        else:
            self._missing()

    def do_POST(self) -> None:
        # Read before anything is refused: a connection that is closed with unread data is reset,
        # and the visitor would not see the answer.
        body = self._read_body()
        if not self._is_allowed({}):
            return
        if urlsplit(self.path).path != "/jobs":
            self._missing()
            return
        # A form on another page cannot send JSON without being asked for permission.
        if body is None or self.headers.get_content_type() != "application/json":
            self._refuse("the request is too long, or not JSON", HTTPStatus.BAD_REQUEST)
            return
        try:
            values = json.loads(body)
        except ValueError:
            self._refuse("the request is not JSON", HTTPStatus.BAD_REQUEST)
            return
        try:
            self._send_json({"key": self._jobs.submit(Request.parse(values)).key})
        except UserError as error:  # of the visitor, not of the page: no failed request
            self._send_json({"error": str(error)})

    def _read_body(self) -> bytes | None:
        """Return the body; None if its length is unknown or too large."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return None
        if int(length) <= MAX_BODY:
            return self.rfile.read(int(length))
        left = min(int(length), MAX_DISCARDED)
        while left and (block := self.rfile.read(min(left, MAX_BODY))):
            left -= len(block)
        return None

    def log_message(self, format: str, *args: Any) -> None:
        """Log below INFO: the page asks for progress several times a second."""
        logger.debug(format, *args)

    def _is_allowed(self, query: dict[str, list[str]]) -> bool:
        """Return whether the visitor may see the page; otherwise answer."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if self._token is None:
            # A page elsewhere may point its own name at this address (DNS rebinding).
            if _is_loopback(host):
                return True
            self._refuse("this page is for this machine only", HTTPStatus.FORBIDDEN)
            return False
        given = query.get("token", [""])[0] or self.headers.get("Authorization", "")[7:]
        cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        if _equal(given, self._token):
            self._new_cookie = True
            return True
        if cookie is not None and _equal(cookie.value, _digest(self._token)):
            return True
        self._refuse("add ?token=... to the address", HTTPStatus.UNAUTHORIZED)
        return False

    _new_cookie = False

    def _missing(self) -> None:
        self._refuse("there is nothing here, or it is kept no longer", HTTPStatus.NOT_FOUND)

    def _refuse(self, message: str, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send_json({"error": message}, status)

    def _send_json(self, content: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        if self._new_cookie:
            self.send_header(
                "Set-Cookie", f"{_COOKIE}={_digest(self._token)}; HttpOnly; SameSite=Strict"
            )
        self.end_headers()
        self.wfile.write(content)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(token: str | None) -> str:
    """Return a text that may be the value of a cookie."""
    return hashlib.sha256((token or "").encode()).hexdigest()


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
