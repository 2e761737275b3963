"""A local wandb server with the subset of the API that the client needs to upload a run."""

from __future__ import annotations

import gzip
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ReceivedRun:
    """The data of one run that the server received.

    Attributes:
        history: lines of the history, by number.
        config: the last configuration.
        files: names of the uploaded files.
        alerts: titles of the alerts.
    """

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    alerts: list[str] = field(default_factory=list)
    display_name: str | None = None

    def curve(self, name: str) -> list[tuple[int, Any]]:
        """Return the (step, value) pairs of a metric, in the order of the history."""
        lines = [self.history[number] for number in sorted(self.history)]
        return [(line["_step"], line[name]) for line in lines if name in line]


class WandbServer:
    """A server that works (``ok``), answers with status 500 (``broken``) or never (``hangs``)."""

    def __init__(self, mood: str = "ok") -> None:
        self.mood, self.runs = mood, dict[str, ReceivedRun]()
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def run(self, name: str) -> ReceivedRun:
        return self.runs.setdefault(name, ReceivedRun())

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if server.mood == "hangs":
                    server._over.wait(120)
                    self.close_connection = True
                    return
                content = b"{}"
                if server.mood == "ok":
                    content = json.dumps(server._respond(self.path, body)).encode()
                self.send_response(200 if server.mood == "ok" else 500)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def handle(self) -> None:
                with suppress(ConnectionError):  # clients end when they like
                    super().handle()

            do_GET = do_POST = do_PUT = _answer

        return Handler

    def _respond(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            request = json.loads(body)
            return {"data": self._graphql(request["query"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            run = self.run(path.split("/")[-2])
            part = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if part:
                for number, line in enumerate(part["content"], part["offset"]):
                    run.history[number] = json.loads(line)
        return {}

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "UpsertBucket" in query:
            run = self.run(variables["name"])
            run.display_name = variables.get("displayName") or run.display_name
            if variables.get("config"):
                run.config = json.loads(variables["config"])
            bucket = self._bucket(variables["name"]) | {
                "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
                "sweepName": None,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            known = variables["name"] in self.runs
            bucket = self._bucket(variables["name"]) if known else None
            return {
                "model": {
                    "id": "p",
                    "name": "p",
                    "entity": {"id": "e", "name": "e"},
                    "bucket": bucket,
                }
            }
        if "CreateRunFiles" in query:
            name = variables["run"]
            self.run(name).files |= set(variables["files"])
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if "NotifyScriptableRunAlert" in query:
            self.run(variables["runName"]).alerts.append(variables["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        viewer = {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.run(name)
        tail = [json.dumps(run.history[max(run.history)])] if run.history else []
        return {
            "id": name,
            "name": name,
            "displayName": run.display_name or name,
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "notes": None,
            "wandbConfig": "{}",
        }


def wait_until(condition: Any, seconds: float = 30) -> None:
    """Wait for a condition that another process fulfils."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not fulfilled after {seconds} s"
        time.sleep(0.05)
