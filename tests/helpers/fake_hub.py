"""A local fake of the Hugging Face hub for the real huggingface_hub client.

It keeps repositories in memory, implements the endpoints of downloads, uploads and listings, and
simulates faults: gated and unknown repositories, server errors, and truncated, altered or dropped
files.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, utils

LARGE = 1024  # bytes: files of at least this size are stored by SHA-256, like LFS files


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    @property
    def commit(self) -> str:
        names = "".join(f"{name}{hashlib.sha1(c).hexdigest()}" for name, c in self.files.items())
        return hashlib.sha1(names.encode()).hexdigest()


class FakeHub:
    """The server, a context manager that starts and stops it.

    Attributes:
        repositories: repositories by ``owner/name``.
        faults: path of a file -> ``short`` (truncated), ``altered`` (wrong bytes) or ``dropped``
            (the connection is closed before the first byte).
        status: HTTP status of all responses, if set.
        altered_uploads: whether uploaded files are altered.
        requests: the requests so far, as ``GET /path``.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, str] = {}
        self.status: int | None = None
        self.requests: list[str] = []
        self.altered_uploads = False
        self.uploads: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], **settings: bool) -> Repository:
        self.repositories[name] = Repository(dict(files), **settings)
        return self.repositories[name]

    def add_folder(self, name: str, folder: Path, under: str = "") -> Repository:
        files = {
            under + path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        repository = self.repositories.setdefault(name, Repository())
        repository.files.update(files)
        return repository


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """Run a fake hub and point huggingface_hub at it, with caches in ``folder``.

    huggingface_hub reads the environment when it is imported, so this sets its constants.
    """
    with FakeHub() as hub:
        point_at(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder / "assets"))
        # Xet is another protocol, which the fake does not implement.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        utils.disable_progress_bars()
        yield hub
        utils.enable_progress_bars()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set the URL of the hub, and lift the offline mode of the tests."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def entry(path: str, content: bytes) -> dict[str, object]:
    """Return a file's entry in the listing of a repository."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    line: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if len(content) >= LARGE:
        sha = hashlib.sha256(content).hexdigest()
        line["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
    return line


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.status is not None:
            self._send_json({"error": "server error"}, self.hub.status)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path.startswith("/large/"):
            kept = body[:-1] if self.hub.altered_uploads else body
            self.hub.uploads[path.removeprefix("/large/")] = kept
            self._send_json({})
        elif path.endswith("/info/lfs/objects/batch"):
            self._large(json.loads(body))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/").split("/"), body)
        elif path.count("/") > 4 and path.split("/")[3] == "resolve":
            owner, name, _, _, *file = path.strip("/").split("/")
            self._file(f"{owner}/{name}", "/".join(file))
        else:  # other requests of the client, which may fail
            self._send_json({"error": "no"}, 404)

    def _repository(self, name: str) -> Repository | None:
        """Return the repository, or send an error response and return None."""
        found = self.hub.repositories.get(name)
        if found is None:
            # Without access, the hub does not reveal whether a repository exists.
            self._send_json(
                {"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"}
            )
        elif found.gated:
            self._send_json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
            return None
        return found

    def _api(self, parts: list[str], body: bytes) -> None:
        name = "/".join(parts[:2])
        repository = self._repository(name)
        if repository is None:
            return
        what = parts[2] if len(parts) > 2 else "revision"
        if len(parts) > 3 and parts[3] not in ("main", repository.commit):
            self._send_json({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            siblings = [{"rfilename": path} for path in repository.files]
            facts = {"id": name, "sha": repository.commit, "private": repository.private}
            self._send_json(facts | {"siblings": siblings})
        elif what == "tree":
            self._send_json([entry(path, content) for path, content in repository.files.items()])
        elif what == "preupload":
            wanted = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in wanted
            ]
            self._send_json({"files": modes})
        elif what == "commit":
            self._commit(name, repository, body)

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
        url = f"{self.hub.url}/{name}/commit/{repository.commit}"
        self._send_json({"commitUrl": url, "commitOid": repository.commit, "success": True})

    def _create(self, wanted: dict[str, str]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.hub.repositories
        if not exists:
            self.hub.add(name, {}, private=wanted.get("visibility") == "private")
        self._send_json({"url": f"{self.hub.url}/{name}", "id": name}, 409 if exists else 200)

    def _large(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        objects = [
            o | {"actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
            for o in wanted["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _file(self, name: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if path not in repository.files:
            self._send_json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[path]
        known = entry(path, content)
        large = known.get("lfs")
        tag = large["oid"] if isinstance(large, dict) else known["oid"]
        headers = {
            "ETag": f'"{tag}"',
            "X-Repo-Commit": repository.commit,
            "X-Linked-Size": str(len(content)),
        }
        sent = content
        if self.command == "GET" and self.hub.faults.get(path) == "short":
            sent = content[: len(content) // 2]
        elif self.hub.faults.get(path) == "altered":
            sent = content[:-1] + bytes([content[-1] ^ 1])
        headers["Content-Type"] = "application/octet-stream"
        self._send(sent, 200, headers, dropped=self.hub.faults.get(path) == "dropped")

    def _send_json(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(json.dumps(content).encode(), status, kind | (headers or {}))

    def _send(
        self, content: bytes, status: int, headers: dict[str, str], dropped: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if dropped:
            self.close_connection = True
        else:
            self.wfile.write(content)
