"""The process that talks to Weights & Biases, beside a training and never in its way.

Started by ``wandb_sink`` as ``python -m rae_xla.train.wandb_process LOG``. It reads one JSON object
a line from stdin and answers on stdout, likewise; what wandb prints goes to the file LOG. wandb may
hang, crash or use the interpreter's time in here: the training is another process. It ends with its
stdin, so it outlives a training that was killed just long enough to hand in what it was told.

Asked: ``{"do": "init" | "log" | "image" | "alert" | "say" | "preempting" | "finish", ...}``.
Answered: ``{"up": {"mode", "url", "folder"}}`` once, and ``{"trouble": text}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

PROBE_SECONDS = 5.0
"""For the server's first answer; without one the run is kept on the disk."""

LAST_SECONDS = 60
"""For handing in what is left, after the training is gone."""


class Run:
    """A wandb run, online if it can be."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._run: Any = None
        self._told: set[str] = set()

    def do(self, request: dict[str, Any]) -> None:
        """Carry out a request; what wandb does not like is told, once for each kind."""
        kind = request.pop("do")
        if self._run is None and kind != "init":
            return
        try:
            getattr(self, f"_{kind}")(**request)
        except Exception as error:
            if kind == "init":
                raise
            if kind not in self._told:
                self._told.add(kind)
                self.answer("trouble", f"{kind}: {error}")

    def answer(self, name: str, value: object) -> None:
        """Send one answer."""
        with suppress(OSError):  # the training may be gone
            print(json.dumps({name: value}), file=self._answers, flush=True)

    def finish(self, code: int = 1) -> None:
        """Hand in what is left and end; ``code`` other than 0: the training failed."""
        signal.alarm(LAST_SECONDS)  # it ends the process, should nobody be left to do so
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=code)

    _finish = finish

    def _init(self, pid: int, **arguments: Any) -> None:
        import wandb

        if key := os.environ.get("WANDB_KEY"):
            os.environ.setdefault("WANDB_API_KEY", key)
        settings = wandb.Settings(x_stats_pid=pid)  # what is measured is the training
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and (problem := _unreachable(wandb.setup().settings.base_url)):
            self._keep_on_disk(problem)
        try:
            self._run = wandb.init(settings=settings, resume="allow", **arguments)
        except Exception as error:
            if os.environ.get("WANDB_MODE", "online") != "online":
                raise
            self._keep_on_disk(" ".join(str(error).split()))
            self._run = wandb.init(settings=settings, resume="allow", **arguments)
        found = self._run.settings
        up = {"mode": found.mode, "url": self._run.url, "folder": found.sync_dir}
        self.answer("up", up)

    def _keep_on_disk(self, problem: str) -> None:
        """Have wandb begin anew, without a server: what it has begun would go on asking for one."""
        import wandb

        self.answer("trouble", f"{problem}; the run is kept on the disk")
        wandb.teardown()
        os.environ["WANDB_MODE"] = "offline"

    def _log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def _image(self, step: int, name: str, path: str, caption: str) -> None:
        import wandb

        self._run.log({name: wandb.Image(path, caption=caption)}, step=step)

    def _alert(self, title: str, text: str, level: str, pause: float) -> None:
        """wandb passes on an alert of the same title only after ``pause`` seconds."""
        self._run.alert(title=title, text=text, level=level, wait_duration=pause)

    def _say(self, line: str) -> None:
        """wandb takes over what is printed: its page has the run's console."""
        print(line, flush=True)

    def _preempting(self) -> None:
        self._run.mark_preempting()


def _unreachable(base_url: str) -> str | None:
    """What is wrong with a server; None if it answers. (wandb itself would try for 90 s.)"""
    import requests

    try:
        answer = requests.post(
            f"{base_url}/graphql", json={"query": "{ __typename }"}, timeout=PROBE_SECONDS
        )
    except (requests.RequestException, ValueError) as error:
        return f"{base_url} cannot be reached ({type(error).__name__})"
    if answer.status_code >= 500:
        return f"{base_url} answers with status {answer.status_code}"
    return None


def serve(requests: Iterable[str], run: Run) -> None:
    """Carry out requests until there are no more."""
    for line in requests:
        run.do(json.loads(line))
    run.finish()


def main(log: str) -> int:
    """Take the pipes away from everything that prints or reads, and serve."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the training
        signal.signal(number, signal.SIG_IGN)
    os.nice(19)  # the training goes first
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing, said = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    run = Run(answers)
    try:
        serve(requests, run)
    except Exception as error:
        run.answer("trouble", f"{error}; going on without it (metrics.jsonl has everything)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
