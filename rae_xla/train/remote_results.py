"""A results folder in a bucket: a local working folder that is uploaded while the run goes on.

The files of a results folder are small and appended to, which objects in a bucket cannot be. A run
therefore writes them to a working folder in the temporary folder of each host. A thread uploads
what has changed, within seconds of every log line, and everything once more at the end. A run that
is resumed, on whichever host, starts from the uploaded files. Checkpoints are written to the bucket
directly. Process 0 writes the files of the run; every other process only its own, such as
``bad_samples.1.jsonl``.

The object ``.running`` marks a folder with an active run. Unlike a lock it outlives a process that
was killed, so the run renews it: a mark that was not renewed for ``LEASE`` seconds is stale.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.storage.owner import is_alive, is_on_this_host, this_process
from rae_xla.storage.staging import download, upload

logger = logging.getLogger(__name__)

MARK_FILE = ".running"

RENEWAL = 30.0
"""Seconds between two renewals of the mark, and at most between two uploads."""

LEASE = 4 * RENEWAL
"""Seconds without a renewal after which the run of a mark is taken to have been killed."""

MIN_PAUSE = 5.0
"""Seconds between two uploads, however many lines are logged."""

FINAL_FOLDER = "wandb"
"""Subfolder that is uploaded at the end only: its files change all the time."""

SHARED_FILES = ("config.yaml", "data.txt", "classes.json", "wandb_id")
"""Files that every process writes equally, so that process 0 alone uploads them."""

_OTHER_PROCESS = re.compile(r"(?:bad_samples|hang-?)\.?(\d+)\.(?:jsonl|txt)")


class Mark:
    """The object ``.running`` of a results folder in a bucket, from ``claim`` to ``release``.

    Args:
        folder: the results folder.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self._path = folder, storage.join(folder, MARK_FILE)
        self._content = {
            "token": uuid.uuid4().hex,
            "since": time.strftime("%Y-%m-%d %H:%M"),
            "renewed": 0,
            **this_process(),
        }

    def check_free(self) -> None:
        """Raise if a process of this host is known to run in the folder; do not wait.

        Raises:
            UserError: it is.
            OSError: the bucket cannot be read.
        """
        if is_alive(owner := self._read()):
            raise UserError(_active(self._folder, owner))

    def claim(self) -> None:
        """Write the mark; wait for ``LEASE`` seconds if the state of another's run is unknown.

        Raises:
            UserError: another run is active in the folder.
            OSError: the bucket cannot be read or written.
        """
        self.check_free()
        owner = self._read()
        if owner and not is_on_this_host(owner):
            self._wait_for_release(owner)
        self._write()

    def renew(self) -> None:
        """Write the mark again, so that other runs see this one.

        Raises:
            UserError: another run has taken the folder over.
            OSError: the bucket cannot be read or written.
        """
        owner = self._read()
        if owner.get("token") != self._content["token"]:
            raise UserError(
                f"another run ({_name(owner)}) has taken {self._folder} over, because this one "
                f"could not renew its mark for {LEASE:.0f} s: let the other one finish"
            )
        self._content["renewed"] += 1
        self._write()

    def release(self) -> None:
        """Remove the mark if it is this run's."""
        if self._read().get("token") == self._content["token"]:
            with contextlib.suppress(FileNotFoundError):
                storage.remove(self._path)

    def _wait_for_release(self, owner: dict[str, Any]) -> None:
        logger.warning(
            "%s: the run of %s did not end properly, or is still active: waiting up to %.0f s to "
            "find out",
            self._folder,
            _name(owner),
            LEASE,
        )
        deadline = time.monotonic() + LEASE
        while time.monotonic() < deadline:
            time.sleep(LEASE / 60)
            current = self._read()
            if not current:
                return
            if current != owner:
                raise UserError(_active(self._folder, current))

    def _read(self) -> dict[str, Any]:
        """Return the content of the mark; empty if there is none."""
        try:
            content = json.loads(storage.read_bytes(self._path))
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"token": None}
        return content if isinstance(content, dict) else {"token": None}

    def _write(self) -> None:
        storage.write_bytes(self._path, json.dumps(self._content).encode() + b"\n")


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"


def _active(folder: str, owner: dict[str, Any]) -> str:
    return (
        f"another run is active in {folder} ({_name(owner)}): wait until it ends, stop it, or "
        "choose another --results-dir"
    )


class ResultsUpload:
    """Uploads the working folder of one process, and renews the mark of its run.

    Args:
        folder: the results folder in the bucket.
        working: the working folder.
        process_index: of this process.
        mark: of the run, in process 0.
    """

    def __init__(self, folder: str, working: Path, process_index: int, mark: Mark | None) -> None:
        self._folder, self._process, self._mark = folder, process_index, mark
        self.working = working
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._failed_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="results upload", daemon=True)
        self.lost: UserError | None = None
        """Why this run may no longer write to the folder; None if it may."""

    def download(self) -> None:
        """Fetch the files that a run appends to or reads, from an earlier start of it."""
        for name in storage.list_files(self._folder):
            of_a_process = _OTHER_PROCESS.fullmatch(name) is not None
            if not self._is_own(name) or (self._process > 0 and not of_a_process):
                continue
            file = self.working / name
            download(storage.join(self._folder, name), file)
            self._uploaded[file] = _version(file)

    def start(self) -> None:
        """Start uploading."""
        self._thread.start()

    def request(self) -> None:
        """Have what has changed uploaded soon; does not wait."""
        self._wake.set()

    def close(self) -> None:
        """Stop the thread, and upload everything that has changed.

        Raises:
            OSError: that fails.
        """
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.lost is None:
            self.upload(final=True)

    def upload(self, *, final: bool = False) -> None:
        """Upload what has changed since the last call; raises ``OSError``."""
        with self._lock:
            for file in sorted(p for p in self.working.rglob("*") if p.is_file()):
                name = file.relative_to(self.working).as_posix()
                if not self._is_own(name) or (name.startswith(FINAL_FOLDER + "/") and not final):
                    continue
                with contextlib.suppress(FileNotFoundError):  # replaced or removed meanwhile
                    version = _version(file)
                    if self._uploaded.get(file) != version:
                        upload(file, storage.join(self._folder, name))
                        self._uploaded[file] = version

    def _is_own(self, name: str) -> bool:
        """Return whether this process uploads a file."""
        if ".unfinished" in name or storage.TEMPORARY_MARK in name or name == MARK_FILE:
            return False
        match = _OTHER_PROCESS.fullmatch(name)
        writer = int(match[1]) if match else None
        if writer is None:
            return self._process == 0 or name not in SHARED_FILES
        return writer == self._process

    def _run(self) -> None:
        renewed = time.monotonic()
        while not self._closed.is_set():
            self._wake.wait(RENEWAL)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                if self._mark is not None and time.monotonic() >= renewed + RENEWAL:
                    self._mark.renew()
                    renewed = time.monotonic()
                self.upload()
                self._failed_since = None
            except UserError as error:
                self.lost = error
                return
            except Exception as error:  # whatever a client raises; the run itself goes on
                self._warn(error)
            self._closed.wait(MIN_PAUSE)

    def _warn(self, error: Exception) -> None:
        if self._failed_since is None:
            self._failed_since = time.monotonic()
            logger.warning(
                "results cannot be written to %s (%s): the run continues, they stay in %s, and "
                "the upload is repeated",
                self._folder,
                error,
                self.working,
            )


@contextlib.contextmanager
def remote_results(folder: str, process_index: int, mark: Mark | None) -> Iterator[ResultsUpload]:
    """Open a results folder in a bucket for one process, within the context.

    The working folder has the name of the results folder. It is removed at the end, unless an
    exception ends the run or the last upload fails: messages refer to its files.

    Args:
        folder: the results folder.
        process_index: of this process.
        mark: the claimed mark, in process 0.

    Raises:
        UserError: at the end, if the results cannot be uploaded.
    """
    temporary = Path(tempfile.mkdtemp(prefix="rae-xla-results-"))
    working = temporary / (storage.split(folder)[1] or "run")
    working.mkdir()
    results = ResultsUpload(folder, working, process_index, mark)
    try:
        results.download()
        results.start()
        yield results
    except BaseException:
        with contextlib.suppress(Exception):
            results.close()
        logger.info("the results of this run are also in %s", working)
        raise
    try:
        results.close()
    except OSError as error:
        raise UserError(
            f"the results cannot be uploaded to {folder}: {error}. They are in {working}: copy "
            f"them with `gcloud storage cp -r '{working}/*' {folder}/`"
        ) from error
    shutil.rmtree(temporary, ignore_errors=True)


def _version(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
