"""The process that runs the wandb client on behalf of a training process.

``wandb_sink`` starts it as ``python -m rae_xla.train.tracking.wandb_process LOG``. It reads one
JSON object per line from stdin and writes responses to stdout in the same format; output of wandb
goes to the file LOG. wandb may hang, crash or block the interpreter here without affecting the
training. The process ends when its stdin is closed, so it outlives a killed training process just
long enough to send what it has received.

Requests: ``{"do": "init" | "log" | "image" | "alert" | "print" | "preempting" | "finish", ...}``.
Responses: ``{"up": {"mode", "url", "folder"}}`` once, and ``{"problem": text}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

PROBE_TIMEOUT = 5.0
"""Seconds for the server's first response; without one the run is offline."""

FINISH_TIMEOUT = 60
"""Seconds to send what is left after the training process has ended."""


class Run:
    """A wandb run: online if the server responds, else offline."""

    def __init__(self, responses: TextIO) -> None:
        self._responses = responses
        self._run: Any = None
        self._reported: set[str] = set()

    def do(self, request: dict[str, Any]) -> None:
        """Handle a request; an error of wandb is reported once for each kind of request."""
        kind = request.pop("do")
        if self._run is None and kind != "init":
            return
        try:
            getattr(self, f"_{kind}")(**request)
        except Exception as error:
            if kind == "init":
                raise
            if kind not in self._reported:
                self._reported.add(kind)
                self.respond("problem", f"{kind}: {error}")

    def respond(self, name: str, value: object) -> None:
        """Send one response."""
        with suppress(OSError):  # the training process may have ended
            print(json.dumps({name: value}), file=self._responses, flush=True)

    def finish(self, code: int = 1) -> None:
        """Send what is left and end the run; a ``code`` other than 0 marks it as failed."""
        signal.alarm(FINISH_TIMEOUT)  # ends this process if the training process is gone
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=code)

    _finish = finish

    def _init(self, pid: int, **arguments: Any) -> None:
        import wandb

        if key := os.environ.get("WANDB_KEY"):
            os.environ.setdefault("WANDB_API_KEY", key)
        settings = wandb.Settings(
            x_stats_pid=pid
        )  # system metrics are those of the training process
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and (problem := _unreachable(wandb.setup().settings.base_url)):
            self._go_offline(problem)
        try:
            self._run = wandb.init(settings=settings, resume="allow", **arguments)
        except Exception as error:
            if os.environ.get("WANDB_MODE", "online") != "online":
                raise
            self._go_offline(" ".join(str(error).split()))
            self._run = wandb.init(settings=settings, resume="allow", **arguments)
        found = self._run.settings
        up = {"mode": found.mode, "url": self._run.url, "folder": found.sync_dir}
        self.respond("up", up)

    def _go_offline(self, problem: str) -> None:
        """Restart wandb in offline mode: what it has started would keep trying to connect."""
        import wandb

        self.respond("problem", f"{problem}; the run is recorded offline")
        wandb.teardown()
        os.environ["WANDB_MODE"] = "offline"

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def _image(self, step: int, name: str, path: str, caption: str) -> None:
        import wandb

        self._run.log({name: wandb.Image(path, caption=caption)}, step=step)

    def _alert(self, title: str, text: str, level: str, pause: float) -> None:
        """Send an alert; wandb drops one with the same title within ``pause`` seconds."""
        self._run.alert(title=title, text=text, level=level, wait_duration=pause)

    def _print(self, line: str) -> None:
        """Print a line; wandb captures the output as the console log of the run."""
        print(line, flush=True)

    def _preempting(self) -> None:
        self._run.mark_preempting()


def _unreachable(base_url: str) -> str | None:
    """Return why a server is not usable; None if it responds. (wandb itself retries for 90 s.)"""
    import requests

    try:
        response = requests.post(
            f"{base_url}/graphql", json={"query": "{ __typename }"}, timeout=PROBE_TIMEOUT
        )
    except (requests.RequestException, ValueError) as error:
        return f"{base_url} cannot be reached ({type(error).__name__})"
    if response.status_code >= 500:
        return f"{base_url} returns status {response.status_code}"
    return None


def serve(requests: Iterable[str], run: Run) -> None:
    """Handle requests until stdin is closed."""
    for line in requests:
        run.do(json.loads(line))
    run.finish()


def main(log: str) -> int:
    """Redirect stdin and stdout of wandb, and handle requests on the original pipes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the training process
        signal.signal(number, signal.SIG_IGN)
    os.nice(19)  # training has priority
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    devnull, log_file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(devnull, 0)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    run = Run(responses)
    try:
        serve(requests, run)
    except Exception as error:
        run.respond(
            "problem", f"{error}; the run continues without it (metrics.jsonl has everything)"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
