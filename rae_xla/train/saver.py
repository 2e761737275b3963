"""Checkpoints written beside the training: it waits for the copy to the host alone.

A save that fails (a full disk, a bucket that cannot be reached) is said and tried again later; the
training goes on, and the checkpoints there were stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rae_xla.data import storage
from rae_xla.interop.checkpoint_folder import (
    MANIFEST,
    UNFINISHED,
    Checkpoint,
    Folder,
    checkpoint_path,
    list_checkpoints,
    remove,
    rests,
    superfluous,
    sync_folder,
)
from rae_xla.runtime import Runtime
from rae_xla.runtime import checkpoint as sharded
from rae_xla.runtime.checkpoint_files import FileFacts
from rae_xla.runtime.snapshot import Snapshot

if TYPE_CHECKING:
    from rae_xla.config import CheckpointConfig

Gathered = tuple[Mapping[str, Tensor], Mapping[str, Any]]

PATIENCE = 5.0
"""Seconds that a save which is due waits for the one before it; then it is left out."""

FAILED = "ckpt/failed"

FIRST_RETRY, LAST_RETRY = 30.0, 600.0
"""Seconds after a failed save until the next one is tried; doubled from failure to failure."""


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        folder: of the checkpoints, local or ``gs://``.
        runtime: where the state is; all its processes make a saver and call it alike.
        settings: which checkpoints are kept.
        say: prints a line.
        gather: the state as it is, on the devices, by ``<part>/<name>``, and what the manifest says
            of it beside the files.
    """

    def __init__(
        self,
        folder: str,
        runtime: Runtime,
        settings: CheckpointConfig,
        say: Callable[[str], None],
        gather: Callable[[], Gathered],
    ) -> None:
        self._folder, self._runtime, self._settings = folder, runtime, settings
        self._say, self._gather = say, gather
        self._group = runtime.saving_group()
        self._thread: threading.Thread | None = None
        self._measured: deque[tuple[str, float]] = deque()
        self._failures = 0
        self._retry_at = 0.0
        self.failure: str | None = None
        """Why the last save failed; None if it did not."""
        self.last: Checkpoint | None = None
        """The newest checkpoint this saver has committed (in process 0 at least)."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def start(self, step: int) -> bool:
        """Copy the state after ``step`` steps to the host and begin to write it.

        Returns whether it was begun: not, if the save before it is still being written.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join(PATIENCE)
        busy = self._thread is not None and self._thread.is_alive()
        if "busy" in self._runtime.exchange("busy" if busy else "free"):
            self._say(
                f"step {step}: no checkpoint, the one before it is still being written; "
                "checkpoint.every_steps asks for them faster than the storage takes them"
            )
            return False
        snapshot, facts = self._snapshot(began)
        self._thread = threading.Thread(
            target=self._write, args=(step, snapshot, facts, began), name="checkpoint", daemon=True
        )
        self._thread.start()
        return True

    def finish(self, step: int, patience: float) -> bool:
        """Have the state after ``step`` steps saved, trying again for ``patience`` seconds.

        Returns whether it is.
        """
        self.wait()
        if self.last is not None and self.last.step == step:
            return True
        began = time.perf_counter()
        snapshot, facts = self._snapshot(began)
        pause = 1.0
        while True:
            self._write(step, snapshot, facts, began)
            over = time.perf_counter() - began + pause > patience
            # Process 0's clock decides for all.
            if self.failure is None or self._runtime.exchange("over" if over else "")[0]:
                return self.failure is None
            time.sleep(pause)
            pause = min(2 * pause, FIRST_RETRY)

    def _snapshot(self, began: float) -> tuple[Snapshot, Mapping[str, Any]]:
        tensors, facts = self._gather()
        snapshot = self._runtime.snapshot(tensors)
        self._measured.append(("ckpt/blocked_seconds", time.perf_counter() - began))
        return snapshot, facts

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    @property
    def retry_due(self) -> bool:
        """Whether a save failed long enough ago to be tried again."""
        idle = self._thread is None or not self._thread.is_alive()
        return self.failure is not None and idle and time.monotonic() > self._retry_at

    def take_figures(self) -> dict[str, float]:
        """What was measured since the last call; failures are counted."""
        figures: dict[str, float] = {}
        while self._measured:
            name, value = self._measured.popleft()
            figures[name] = figures.get(name, 0) + value if name == FAILED else value
        return figures

    def _write(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], began: float) -> None:
        path = checkpoint_path(self._folder, step)
        # In a bucket nothing can be renamed: there the manifest alone decides.
        target = path if storage.is_remote(path) else path + UNFINISHED
        try:
            sharded.save(
                snapshot,
                Folder(target),
                begin=lambda: self._make_room(path, target),
                commit=lambda files: _commit(path, target, files, facts),
                group=self._group,
            )
        except Exception as error:
            self._fail(step, target, error)
            return
        self.failure, self._failures = None, 0
        self.last = Checkpoint(path)
        self._measured.append(("ckpt/seconds", time.perf_counter() - began))
        if self._runtime.process_index == 0:
            self._prune(step)

    def _make_room(self, path: str, target: str) -> None:
        """Delete what earlier attempts left, of this step and of others."""
        storage.make_folder(self._folder)
        for left in rests(self._folder):
            remove(left)
        if target == path and storage.exists(storage.join(path, MANIFEST)):
            remove(path)
        storage.make_folder(target)

    def _fail(self, step: int, target: str, error: Exception) -> None:
        self._failures += 1
        wait = min(FIRST_RETRY * 2 ** (self._failures - 1), LAST_RETRY)
        self._retry_at = time.monotonic() + wait
        self.failure = str(error) or type(error).__name__
        self._measured.append((FAILED, 1))
        self._say(f"step {step}: the checkpoint could not be written: {self.failure}")
        if self._runtime.process_index == 0:
            with contextlib.suppress(OSError):
                remove(target)  # of no use, and a full disk needs the room

    def _prune(self, step: int) -> None:
        """Delete what the settings do not keep; never the checkpoint just written.

        Those of later steps are broken, or the run would not have gone on from before them: they
        are left for people to see, and count for nothing.
        """
        settings = self._settings
        try:
            steps = [c.step for c in list_checkpoints(self._folder) if c.step <= step]
            for old in superfluous(steps, settings.keep_last, settings.keep_every):
                remove(checkpoint_path(self._folder, old))
        except OSError as error:
            self._say(f"step {step}: old checkpoints could not be deleted: {error}")


def _commit(
    path: str, target: str, files: Mapping[str, FileFacts], facts: Mapping[str, Any]
) -> None:
    """Write the manifest, which makes the files a checkpoint; on a disk, rename their folder."""
    there = storage.list_files(target)
    for name, said in files.items():
        size = there[name].size if name in there else None
        if size != said.size:
            raise OSError(f"{storage.join(target, name)} has {size} bytes instead of {said.size}")
    manifest = {**facts, "files": {name: asdict(said) for name, said in sorted(files.items())}}
    text = json.dumps(manifest, indent=1) + "\n"
    storage.write_bytes(storage.join(target, MANIFEST), text.encode())
    if target == path:
        return
    sync_folder(target)
    if os.path.exists(path):
        remove(path)
    os.rename(target, path)
    sync_folder(os.path.dirname(path))
