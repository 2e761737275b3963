"""The results folder of a run: its files, and the checks before a run may use it.

It holds `config.yaml`, `data.txt`, `metrics.jsonl`, `environment.jsonl`, `bad_samples.jsonl`,
`classes.json`, `samples/`, and `checkpoints/` unless `checkpoint.dir` is set. While a run is active
it holds a lock on `.running`. A folder in a bucket is written through a local one, see
`remote_results`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rae_xla import storage
from rae_xla.checkpoint.manager import (
    BrokenCheckpointError,
    Checkpoint,
    checkpoints_folder,
    list_checkpoints,
    read_checkpoint_manifest,
)
from rae_xla.config import RunConfig, load_config
from rae_xla.data.class_names import record_class_names
from rae_xla.errors import UserError
from rae_xla.runtime import Backend
from rae_xla.storage.staging import check_writable
from rae_xla.train.remote_results import Mark, ResultsUpload, remote_results

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.txt"
RUNNING_FILE = ".running"


def bad_samples_file(process_index: int) -> str:
    """Return the file in which a process lists replaced samples; hosts may share the folder."""
    return "bad_samples.jsonl" if process_index == 0 else f"bad_samples.{process_index}.jsonl"


@dataclass(frozen=True)
class ResultsFolder:
    """The results folder of an active run.

    Attributes:
        location: local, or in a bucket.
        local: where this process writes files: the folder itself, or the working folder of one in
            a bucket.
        upload: uploads the working folder; None for a local folder.
    """

    location: str
    local: Path
    upload: ResultsUpload | None = None


def check_folder(location: str | Path, config: RunConfig, data: str) -> None:
    """Run the checks of ``open_results`` and ``claim_folder`` before the devices are started.

    Raises:
        UserError: as these functions.
    """
    if storage.is_remote(str(location)):
        try:
            _check_run(str(location), config, data)
            Mark(str(location)).check_free()
            check_writable(str(location))
        except OSError as error:
            raise UserError(_cannot_write(location, error)) from error
        return
    folder = Path(location)
    _check_run(folder, config, data)
    with suppress(OSError), (folder / RUNNING_FILE).open("r+", encoding="utf-8") as file:
        if (problem := _lock(file, folder)) is not None:
            raise UserError(problem)


@contextmanager
def open_results(location: str | Path, backend: Backend) -> Iterator[ResultsFolder]:
    """Open the results folder of a run for all of its processes, within the context.

    A local folder is locked (``hold_folder``), one in a bucket is marked and written through a
    local working folder (``remote_results``).

    Raises:
        UserError: another run is active in the folder, or the folder cannot be written.
    """
    if not storage.is_remote(str(location)):
        with hold_folder(Path(location), backend):
            yield ResultsFolder(str(location), Path(location))
        return
    folder = str(location)
    mark = Mark(folder) if backend.process_index == 0 else None
    problem = _claim_mark(mark, folder) if mark is not None else ""
    if problem := backend.all_gather_text(problem)[0]:
        raise UserError(problem)
    try:
        with remote_results(folder, backend.process_index, mark) as upload:
            yield ResultsFolder(folder, upload.working, upload)
    finally:
        if mark is not None:
            with suppress(OSError):
                mark.release()


def _claim_mark(mark: Mark, folder: str) -> str:
    """Claim a results folder in a bucket; returns the problem, empty if there is none."""
    try:
        mark.claim()
    except OSError as error:
        return _cannot_write(folder, error)
    except UserError as error:
        return str(error)
    return ""


@contextmanager
def hold_folder(folder: Path, backend: Backend) -> Iterator[None]:
    """Lock a results folder for this run within the context.

    The operating system releases the lock when the process ends, for whatever reason. Process 0
    holds it for all processes of the run. A file system without locks is not locked.

    Raises:
        UserError: another run is active in the folder, or the folder cannot be written.
    """
    file, problem = _take(folder) if backend.process_index == 0 else (None, None)
    problem = backend.all_gather_text(problem or "")[0]
    try:
        if problem:
            raise UserError(problem)
        yield
    finally:
        if file is not None:
            file.close()


def _take(folder: Path) -> tuple[IO[str] | None, str | None]:
    """Return the locked file, or the problem."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / RUNNING_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        return None, _cannot_write(folder, error)
    if (problem := _lock(file, folder)) is not None:
        file.close()
        return None, problem
    file.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
    file.flush()
    return file, None


def _lock(file: IO[str], folder: Path) -> str | None:
    """Lock a file until it is closed; returns the problem if another process holds the lock.

    It is a record lock: unlike a lock by ``flock``, it is not inherited by forked processes.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return (
            f"another run is active in {folder} ({file.read().strip()}): wait until it ends, stop "
            "it, or choose another --results-dir"
        )
    except OSError:
        pass  # a file system without locks
    return None


def claim_folder(
    results: ResultsFolder | Path, config: RunConfig, data: str, class_names: Sequence[str] = ()
) -> None:
    """Write the files that describe this run, after checking that the folder has no other run.

    A folder without checkpoints may be taken over: nothing is lost. The configuration and data of
    existing checkpoints are read from their own manifests, since the results folder may be missing
    or on another machine.

    Args:
        results: the results folder; a path stands for a local one.
        config: of the run.
        data: fingerprint of the training shards; it does not depend on their location.
        class_names: of the training data, by label; used when sampling from the run.

    Raises:
        UserError: the folder holds another run, ``checkpoint.resume`` forbids to resume, or the
            folder or that of the checkpoints cannot be written.
    """
    if isinstance(results, Path):
        results = ResultsFolder(str(results), results)
    folder = results.local
    _check_run(results.location, config, data)
    place = checkpoints_folder(config, results.location)
    try:
        # Now rather than when the first checkpoint is due, hours later.
        check_writable(place)
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {place}: {error}. Correct checkpoint.dir or --results-dir"
        ) from error
    try:
        config.save(folder / CONFIG_FILE)
        (folder / DATA_FILE).write_text(data + "\n", encoding="utf-8")
        record_class_names(folder, class_names)
    except OSError as error:
        raise UserError(_cannot_write(folder, error)) from error


def _cannot_write(folder: str | Path, error: OSError) -> str:
    return f"cannot write to the results folder {folder}: {error}"


def _check_run(location: str | Path, config: RunConfig, data: str) -> None:
    """Raise unless the checkpoints of the folder, if any, are those of this run."""
    folder = str(location)
    if storage.exists(folder) and not storage.is_folder(folder):
        raise UserError(f"--results-dir {folder} is a file: choose a folder")
    place = checkpoints_folder(config, folder)
    if checkpoints := list_checkpoints(place):
        manifest = _newest_manifest(checkpoints)
        if manifest is not None:
            _check_config(place, config, _config_of(manifest))
            if manifest["data"]["fingerprint"] != data:
                raise UserError(
                    f"{place} has checkpoints of a run on other training data than "
                    f"{config.data.train}: choose {_another(config)}, or use the shards that the "
                    "run was started with"
                )
        if not config.checkpoint.resume:
            raise UserError(
                f"{place} has checkpoints of this run, and checkpoint.resume is false: set it to "
                f"true to resume, or choose {_another(config)}"
            )
    elif not storage.is_remote(folder) and (
        old := sorted(Path(folder, "checkpoints").glob("step-????????.pt"))
    ):
        raise UserError(
            f"{folder} has checkpoints of an older version, from which training cannot resume "
            f"(their weights can be loaded: stage_1.ckpt or stage_2.ckpt={old[-1]}): choose "
            "another --results-dir"
        )


def _newest_manifest(checkpoints: list[Checkpoint]) -> dict[str, Any] | None:
    """Return the newest readable manifest; whether its checkpoint is complete is checked later."""
    for checkpoint in reversed(checkpoints):
        try:
            return read_checkpoint_manifest(checkpoint)
        except BrokenCheckpointError:
            continue
    return None


def _config_of(manifest: dict[str, Any]) -> RunConfig:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        json.dump(manifest["config"], file)  # JSON is YAML
        file.flush()
        return load_config(file.name)


def _another(config: RunConfig) -> str:
    """Return the setting to change in order to start a new run."""
    return "another checkpoint.dir" if config.checkpoint.dir else "another --results-dir"


def _check_config(place: str, config: RunConfig, saved: RunConfig) -> None:
    changed = config.diff(saved)
    if not changed:
        return
    new, old = config.flat(), saved.flat()
    shown = "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    raise UserError(
        f"{place} has checkpoints of a run with another configuration ({shown}{more}). Choose "
        f"{_another(config)}, or use the configuration that the run was started with"
    )
