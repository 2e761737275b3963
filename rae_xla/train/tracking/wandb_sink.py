"""Send metrics and images to Weights & Biases without ever blocking the training loop.

wandb's own client may block or crash the process that uses it, so it runs in a separate process
(``wandb_process``). The main thread puts requests into a bounded queue. One thread starts that
process and reads its responses, another writes the requests to its pipe. If wandb is slow the queue
fills up, and further requests are dropped and counted; ``metrics.jsonl`` still has everything.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import rae_xla

if TYPE_CHECKING:
    from rae_xla.config import TrackingConfig

logger = logging.getLogger(__name__)

QUEUE_SIZE = 1000
"""Requests that may be queued."""

CLOSE_TIMEOUT = 30.0
"""Seconds to send what is queued when training ends; a preempted machine has no more."""

CONNECT_TIMEOUT = 20.0
"""The same if wandb has not started yet: longer than it takes to give up on a server."""


def wandb_place(tracking: TrackingConfig) -> dict[str, str | None]:
    """Return project and entity.

    They are those of the configuration, else of ``WANDB_PROJECT`` and ``WANDB_ENTITY``, else of
    ``PROJECT`` and ``ENTITY``, the variables that the reference implementation reads.
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
    """The wandb run of a results folder; a run that is restarted there resumes the same wandb run.

    Args:
        folder: the results folder; its file ``wandb_id`` has the id of the wandb run.
        tracking: section of the configuration.
        config: shown by wandb as the configuration of the run.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        tracking: TrackingConfig,
        config: Mapping[str, Any],
    ) -> None:
        self.dropped = 0
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_SIZE)
        self._process: subprocess.Popen[str] | None = None
        self._over = threading.Event()
        self.up: dict[str, str] | None = None
        """``mode``, ``url`` and ``folder`` of the run, once it has started."""
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        id_file, self._log = folder / "wandb_id", folder / "wandb" / "rae-xla.log"
        self._log.touch()
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8").strip()
        self.send(
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

    def send(self, kind: str, **content: Any) -> None:
        """Queue a request (see ``wandb_process``); never blocks."""
        if self._over.is_set():
            return
        try:
            self._queue.put_nowait({"do": kind, **content})
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning(
                    "wandb is too slow: some metrics will not reach it (metrics.jsonl has "
                    "everything)"
                )

    def flush(self, timeout: float) -> None:
        """Wait until all requests have been written to the pipe, at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self, code: int) -> None:
        """End the wandb run with an exit code, within ``CLOSE_TIMEOUT`` seconds."""
        started, sent = time.monotonic(), False
        while self._thread.is_alive():
            if time.monotonic() - started > (CONNECT_TIMEOUT if self.up is None else CLOSE_TIMEOUT):
                break
            if not sent:
                with suppress(queue.Full):  # retried until the queue has space
                    self._queue.put_nowait({"do": "finish", "code": code})
                    sent = True
            self._thread.join(0.05)
        if self._thread.is_alive():
            self._over.set()
            if self._process is not None:
                self._process.kill()
            where = self.up["folder"] if self.up else None
            rest = f"`wandb sync {where}` sends the rest" if where else ""
            logger.warning("wandb: not everything was sent in time%s%s", rest and "; ", rest)
        if self.dropped:
            logger.warning(
                "wandb: %d messages did not reach it (metrics.jsonl has them)", self.dropped
            )

    def _run(self) -> None:
        """Start the process and read its responses, until it or the training ends."""
        try:
            self._communicate()
        finally:
            self._over.set()

    def _communicate(self) -> None:
        root = str(Path(rae_xla.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "rae_xla.train.tracking.wandb_process", str(self._log)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C must reach only the training process
            )
        except OSError as error:
            logger.warning(
                "wandb: %s; the run continues without it (metrics.jsonl has everything)", error
            )
            return
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        writer = threading.Thread(
            target=self._write_requests, args=(process.stdin,), name="wandb requests", daemon=True
        )
        writer.start()
        for line in process.stdout:
            self._handle_response(json.loads(line))
        if (code := process.wait()) and not self._over.is_set():
            logger.warning("wandb: its process exited with status %d; see %s", code, self._log)

    def _write_requests(self, requests: IO[str]) -> None:
        try:
            while (request := self._queue.get()) is not None:
                requests.write(json.dumps(request) + "\n")
                requests.flush()
                self._queue.task_done()
                if request["do"] == "finish":
                    break
            requests.close()
        except OSError:
            pass  # the process has exited and reported the reason

    def _handle_response(self, response: dict[str, Any]) -> None:
        if "problem" in response:
            logger.warning("wandb: %s", response["problem"])
            return
        self.up = response["up"]
        if self.up["mode"] == "online":
            logger.info("wandb: %s", self.up["url"])
        elif self.up["mode"] == "offline":
            logger.info("wandb: offline; `wandb sync %s` uploads it", self.up["folder"])
