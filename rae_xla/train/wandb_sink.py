"""What a training tells Weights & Biases, handed over without ever waiting for it.

The main thread puts requests into a bounded queue. A thread starts the process that talks to wandb
(``wandb_process``) and writes them to its pipe, another reads what it answers. If wandb is slow the
queue fills up and what does not fit is dropped and counted; ``metrics.jsonl`` has it all the same.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import rae_xla

if TYPE_CHECKING:
    from rae_xla.config import TrackingConfig

QUEUE = 1000
"""Requests that may wait."""

LAST_SECONDS = 30.0
"""For what is left when the training ends; a preempted machine has no more."""

UP_SECONDS = 20.0
"""The same where wandb has not even begun: more than it takes to give a server up."""


def wandb_place(tracking: TrackingConfig) -> dict[str, str | None]:
    """Project and entity: of the configuration, else of ``WANDB_PROJECT`` and ``WANDB_ENTITY``,
    else of the ``PROJECT`` and ``ENTITY`` that the papers' implementation reads.
    """
    environment = os.environ
    return {
        "project": tracking.project
        or environment.get("WANDB_PROJECT")
        or environment.get("PROJECT")
        or "rae_xla",
        "entity": tracking.entity or environment.get("WANDB_ENTITY") or environment.get("ENTITY"),
    }


class WandbSink:
    """One wandb run, tied to a results folder: started again in it, it is the same run.

    Args:
        folder: of the results; ``wandb_id`` in it is the run's.
        tracking: the configuration's section.
        config: what wandb shows as the run's configuration.
        say: prints a line; called from other threads.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        tracking: TrackingConfig,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._say, self.dropped = say, 0
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE)
        self._process: subprocess.Popen[str] | None = None
        self._over = threading.Event()
        self.up: dict[str, str] | None = None
        """Where the run is, once it is: ``mode``, ``url``, ``folder``."""
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        id_file, self._log = folder / "wandb_id", folder / "wandb" / "rae-xla.log"
        self._log.touch()
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        self.put(
            "init",
            **wandb_place(tracking),
            name=tracking.name or folder.resolve().name,
            id=run_id,
            dir=str(folder.resolve()),
            config=dict(config),
            pid=os.getpid(),
        )
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def put(self, kind: str, **content: Any) -> None:
        """Ask for something (see ``wandb_process``), and wait for nothing."""
        if self._over.is_set():
            return
        try:
            self._waiting.put_nowait({"do": kind, **content})
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._say(
                    "wandb is too slow: from now on some figures do not reach it (metrics.jsonl "
                    "has everything)"
                )

    def flush(self, patience: float) -> None:
        """Wait until all was handed over, at most ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self, code: int) -> None:
        """End the run, with an exit code, within ``LAST_SECONDS``."""
        began, asked = time.monotonic(), False
        while self._thread.is_alive():
            if time.monotonic() - began > (UP_SECONDS if self.up is None else LAST_SECONDS):
                break
            if not asked:
                with suppress(queue.Full):  # there will be room
                    self._waiting.put_nowait({"do": "finish", "code": code})
                    asked = True
            self._thread.join(0.05)
        if self._thread.is_alive():
            self._over.set()
            if self._process is not None:
                self._process.kill()
            where = self.up["folder"] if self.up else None
            rest = f"the rest is in {where}: `wandb sync {where}` sends it" if where else ""
            self._say(f"wandb: not all was sent in time{rest and '; '}{rest}")
        if self.dropped:
            self._say(f"wandb: {self.dropped} messages did not reach it (metrics.jsonl has them)")

    def _run(self) -> None:
        """Start the process and listen to it, until it or the training ends."""
        try:
            self._talk()
        finally:
            self._over.set()

    def _talk(self) -> None:
        root = str(Path(rae_xla.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "rae_xla.train.wandb_process", str(self._log)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is meant for the training
            )
        except OSError as error:
            self._say(f"wandb: {error}; going on without it (metrics.jsonl has everything)")
            return
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        feeder = threading.Thread(
            target=self._feed, args=(process.stdin,), name="wandb requests", daemon=True
        )
        feeder.start()
        for line in process.stdout:
            self._hear(json.loads(line))
        if (code := process.wait()) and not self._over.is_set():
            self._say(f"wandb: its process ended with status {code}; {self._log} says more")

    def _feed(self, requests: IO[str]) -> None:
        try:
            while (request := self._waiting.get()) is not None:
                requests.write(json.dumps(request) + "\n")
                requests.flush()
                self._waiting.task_done()
                if request["do"] == "finish":
                    break
            requests.close()
        except OSError:
            pass  # the process is gone, and has said why

    def _hear(self, answer: dict[str, Any]) -> None:
        if "trouble" in answer:
            self._say(f"wandb: {answer['trouble']}")
            return
        self.up = answer["up"]
        if self.up["mode"] == "online":
            self._say(f"wandb: {self.up['url']}")
        elif self.up["mode"] == "offline":
            self._say(f"wandb: offline; `wandb sync {self.up['folder']}` sends it")
