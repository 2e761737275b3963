"""A small Hugging Face hub on this machine, for the real huggingface_hub client.

It keeps repositories in memory, answers the endpoints that downloads, uploads and listings need,
and can be told to misbehave: gated and unknown repositories, errors of its own, files cut short,
altered or broken off on the way.
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

LARGE = 1024  # bytes from which a file is a large one, known by its SHA-256


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
    """The server; ``with`` starts and stops it.

    Attributes:
        repositories: by ``owner/name``.
        faults: path of a file -> ``short`` (fewer bytes than it has), ``altered`` (other bytes),
            ``dropped`` (the connection breaks before a byte has come).
        status: answers everything with this HTTP status, if set.
        altered_uploads: keeps other bytes than were sent to it.
        requests: what was asked, as ``GET /path``.
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
    """A hub that huggingface_hub means while it runs, with caches in ``folder``.

    The client reads the environment once, when it is imported; so this sets what it has read.
    """
    with FakeHub() as hub:
        point_at(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder / "assets"))
        # the plain protocol, which a server of a few lines can speak
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        utils.disable_progress_bars()
        yield hub
        utils.enable_progress_bars()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make an address the hub's, wherever the tests forbid a network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def entry(path: str, content: bytes) -> dict[str, object]:
    """A line of the tree, as the hub has it."""
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
            self._say({"error": "out of order"}, self.hub.status)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif path.startswith("/large/"):
            kept = body[:-1] if self.hub.altered_uploads else body
            self.hub.uploads[path.removeprefix("/large/")] = kept
            self._say({})
        elif path.endswith("/info/lfs/objects/batch"):
            self._large(json.loads(body))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/").split("/"), body)
        elif path.count("/") > 4 and path.split("/")[3] == "resolve":
            owner, name, _, _, *file = path.strip("/").split("/")
            self._file(f"{owner}/{name}", "/".join(file))
        else:  # what the client asks beside
            self._say({"error": "no"}, 404)

    def _repository(self, name: str) -> Repository | None:
        """The repository, or an answer that there is none for this client."""
        found = self.hub.repositories.get(name)
        if found is None:
            # the hub tells strangers neither that a repository is private nor that it is missing
            self._say({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif found.gated:
            self._say({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
            return None
        return found

    def _api(self, words: list[str], body: bytes) -> None:
        name = "/".join(words[:2])
        repository = self._repository(name)
        if repository is None:
            return
        what = words[2] if len(words) > 2 else "revision"
        if len(words) > 3 and words[3] not in ("main", repository.commit):
            self._say({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            siblings = [{"rfilename": path} for path in repository.files]
            facts = {"id": name, "sha": repository.commit, "private": repository.private}
            self._say(facts | {"siblings": siblings})
        elif what == "tree":
            self._say([entry(path, content) for path, content in repository.files.items()])
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
            self._say({"files": modes})
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
        self._say({"commitUrl": url, "commitOid": repository.commit, "success": True})

    def _create(self, wanted: dict[str, str]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.hub.repositories
        if not there:
            self.hub.add(name, {}, private=wanted.get("visibility") == "private")
        self._say({"url": f"{self.hub.url}/{name}", "id": name}, 409 if there else 200)

    def _large(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        objects = [
            o | {"actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
            for o in wanted["objects"]
        ]
        self._say({"transfer": "basic", "objects": objects})

    def _file(self, name: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if path not in repository.files:
            self._say({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
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

    def _say(
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
