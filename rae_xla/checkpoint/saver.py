"""Asynchronous saving: training waits for the copy to the host, a thread writes the files.

A save that fails (a full disk, an unreachable bucket) is logged and retried later; training
continues, and existing checkpoints are not affected.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rae_xla.checkpoint.format import Folder
from rae_xla.checkpoint.manager import (
    Checkpoint,
    checkpoint_path,
    commit,
    delete_checkpoint,
    list_checkpoints,
    prepare_folder,
    prunable_steps,
    saving_path,
)
from rae_xla.checkpoint.posthoc_ema import retire, thin_out
from rae_xla.checkpoint.writer import save
from rae_xla.runtime import Backend
from rae_xla.runtime.snapshot import Snapshot
from rae_xla.runtime.waiting import waiting_notice

if TYPE_CHECKING:
    from rae_xla.config import CheckpointConfig

logger = logging.getLogger(__name__)

CheckpointContents = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors on the devices by ``<part>/<name>``, and the entries of the manifest except files."""

BUSY_TIMEOUT = 5.0
"""Seconds that a save waits for the previous one to finish; after that it is skipped."""

MIN_RETRY_DELAY, MAX_RETRY_DELAY = 30.0, 600.0
"""Seconds from a failed save to the next attempt; the delay doubles with every failure."""

FINISH_RETRY_DELAY = 1.0
"""Seconds from the first failed attempt of ``finish`` to the next; also doubled."""

FAILED_METRIC = "ckpt/failed"


class Saver:
    """Saves the checkpoints of a run, one at a time, and deletes those that are not kept.

    All processes of the backend construct one and make the same calls.

    Args:
        folder: of the checkpoints, local or ``gs://``.
        backend: that holds the state.
        settings: which checkpoints to keep.
        gather: returns the current state and what the manifest records about it.
        keep_averages: how many checkpoints that are not kept are reduced to their power-function
            averages, if they have any, instead of deleted.

    Attributes:
        failure: why the last save failed; None if it succeeded.
        error: the error of the last save that failed.
        last: the newest checkpoint that this saver has committed.
    """

    def __init__(
        self,
        folder: str,
        backend: Backend,
        settings: CheckpointConfig,
        gather: Callable[[], CheckpointContents],
        keep_averages: int = 0,
    ) -> None:
        self._keep_averages = keep_averages
        self._folder, self._backend, self._settings = folder, backend, settings
        self._gather = gather
        self._group = backend.checkpoint_group()
        self._thread: threading.Thread | None = None
        self._measured: deque[tuple[str, float]] = deque()
        self._failures = 0
        self._retry_at = 0.0
        self.failure: str | None = None
        self.error: Exception | None = None
        self.last: Checkpoint | None = None

    def start(self, step: int) -> bool:
        """Copy the state to the host and start writing it as the checkpoint of ``step``.

        Returns:
            False if the save was skipped because the previous one is still being written.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join(BUSY_TIMEOUT)
        busy = self._thread is not None and self._thread.is_alive()
        if "busy" in self._backend.all_gather_text("busy" if busy else "free"):
            self._warn(
                f"step {step}: no checkpoint, the previous one is still being written; "
                "checkpoint.every_steps is too small for the speed of the storage"
            )
            return False
        snapshot, facts = self._snapshot(began)
        self._thread = threading.Thread(
            target=self._write, args=(step, snapshot, facts, began), name="checkpoint", daemon=True
        )
        self._thread.start()
        return True

    def finish(self, step: int, timeout: float) -> bool:
        """Save the state as the checkpoint of ``step`` before returning, with retries.

        Args:
            step: number of optimizer steps taken.
            timeout: seconds for which a failed save is retried.

        Returns:
            Whether the checkpoint was committed.
        """
        self.wait()
        if self.last is not None and self.last.step == step:
            return True
        began = time.perf_counter()
        snapshot, facts = self._snapshot(began)
        delay = FINISH_RETRY_DELAY
        while True:
            self._write(step, snapshot, facts, began)
            over = time.perf_counter() - began + delay > timeout
            # All processes fail together; the clock of process 0 decides for all.
            if self.failure is None or self._backend.all_gather_text("over" if over else "")[0]:
                return self.failure is None
            time.sleep(delay)
            delay = min(2 * delay, MIN_RETRY_DELAY)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            with waiting_notice(self._describe_wait):
                self._thread.join()

    def _describe_wait(self) -> str:
        return f"waiting until the checkpoint that is being written to {self._folder} is complete"

    @property
    def retry_due(self) -> bool:
        """Whether the delay after a failed save has passed."""
        idle = self._thread is None or not self._thread.is_alive()
        return self.failure is not None and idle and time.monotonic() > self._retry_at

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics recorded since the last call (``ckpt/...``)."""
        metrics: dict[str, float] = {}
        while self._measured:
            name, value = self._measured.popleft()
            metrics[name] = metrics.get(name, 0) + value if name == FAILED_METRIC else value
        return metrics

    def _snapshot(self, began: float) -> tuple[Snapshot, Mapping[str, Any]]:
        tensors, facts = self._gather()
        snapshot = self._backend.snapshot(tensors)
        self._measured.append(("ckpt/blocked_seconds", time.perf_counter() - began))
        return snapshot, facts

    def _write(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], began: float) -> None:
        path = checkpoint_path(self._folder, step)
        try:
            save(
                snapshot,
                Folder(saving_path(path)),
                begin=lambda: prepare_folder(self._folder, path),
                commit=lambda files: commit(path, files, facts),
                group=self._group,
            )
        except Exception as error:
            self._record_failure(step, saving_path(path), error)
            return
        self.failure, self._failures = None, 0
        self.last = Checkpoint(path)
        self._measured.append(("ckpt/seconds", time.perf_counter() - began))
        if self._backend.process_index == 0:
            self._prune(step)

    def _record_failure(self, step: int, target: str, error: Exception) -> None:
        self._failures += 1
        delay = min(MIN_RETRY_DELAY * 2 ** (self._failures - 1), MAX_RETRY_DELAY)
        self._retry_at = time.monotonic() + delay
        self.failure, self.error = str(error) or type(error).__name__, error
        self._measured.append((FAILED_METRIC, 1))
        self._warn(f"step {step}: the checkpoint could not be written: {self.failure}")
        if self._backend.process_index == 0:
            with contextlib.suppress(OSError):
                delete_checkpoint(target)  # it is useless, and a full disk needs the space

    def _prune(self, step: int) -> None:
        """Delete or reduce the checkpoints that the settings do not keep, never the one just saved.

        Checkpoints of later steps are broken, or the run would have resumed from them. They are
        kept for inspection, and do not count towards ``keep_last``.
        """
        settings = self._settings
        try:
            steps = [c.step for c in list_checkpoints(self._folder) if c.step <= step]
            for old in prunable_steps(steps, settings.keep_last, settings.keep_every):
                path = checkpoint_path(self._folder, old)
                if self._keep_averages:
                    retire(path)
                else:
                    delete_checkpoint(path)
            if self._keep_averages:
                thin_out(self._folder, self._keep_averages)
        except OSError as error:
            self._warn(f"step {step}: old checkpoints could not be deleted: {error}")

    def _warn(self, message: str) -> None:
        if self._backend.process_index == 0:
            logger.warning(message)
