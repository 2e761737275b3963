"""A results folder: `config.yaml`, `data.txt`, `metrics.jsonl`, `environment.jsonl`,
`bad_samples.jsonl`, `classes.json`, `samples/`, and `checkpoints/` unless `checkpoint.dir` is
elsewhere. `.running` is locked by the run that is going on.
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
from pathlib import Path
from typing import IO, Any

from rae_xla.config import RunConfig, load_config
from rae_xla.data.class_names import record_class_names
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import (
    BrokenCheckpointError,
    Checkpoint,
    list_checkpoints,
    read_manifest,
)
from rae_xla.runtime import Runtime
from rae_xla.train.checkpoint import checkpoints_folder

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.txt"
RUNNING_FILE = ".running"


def bad_samples_file(process_index: int) -> str:
    """Where a process lists the samples it had to replace; hosts may share a results folder."""
    return "bad_samples.jsonl" if process_index == 0 else f"bad_samples.{process_index}.jsonl"


def check_folder(folder: Path, config: RunConfig, data: str) -> None:
    """Find out, before the devices are started, what ``hold_folder`` and ``claim_folder`` would
    refuse.

    Raises:
        UserError: as they do.
    """
    _check_run(folder, config, data)
    with suppress(OSError), (folder / RUNNING_FILE).open("r+", encoding="utf-8") as file:
        if (problem := _lock(file, folder)) is not None:
            raise UserError(problem)


@contextmanager
def hold_folder(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Keep other runs out of a results folder while this one goes on.

    The lock is the system's: it ends with the process, however that ends. One process of a run
    takes it for all; where the file system has no locks, nothing is held.

    Raises:
        UserError: another run is going on there, or the folder cannot be written.
    """
    file, problem = _take(folder) if runtime.process_index == 0 else (None, None)
    problem = runtime.exchange(problem or "")[0]
    try:
        if problem:
            raise UserError(problem)
        yield
    finally:
        if file is not None:
            file.close()


def _take(folder: Path) -> tuple[IO[str] | None, str | None]:
    """The locked file, or what is in the way."""
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
    """Lock a file until it is closed; who has locked it already, if anyone. (A record lock: unlike
    those of ``flock``, processes that are forked do not hold on to it.)
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return (
            f"a run is going on in {folder} ({file.read().strip()}): wait for its end, stop it, or "
            "give another --results-dir"
        )
    except OSError:
        pass  # a file system without locks
    return None


def claim_folder(
    folder: Path, config: RunConfig, data: str, class_names: Sequence[str] = ()
) -> None:
    """Make the folder this run's, or check that it is already.

    A run that has no checkpoint yet has nothing to lose, and another may take its folder. What the
    checkpoints are of stands in themselves: the results folder may be lost, or another machine's.

    Args:
        folder: the results folder.
        config: of the run.
        data: the fingerprint of its training shards, wherever they lie.
        class_names: theirs, by label; kept for those who draw from the run.

    Raises:
        UserError: when it holds another run, when the run must not be resumed, or when it cannot
            be written.
    """
    _check_run(folder, config, data)
    try:
        config.save(folder / CONFIG_FILE)
        (folder / DATA_FILE).write_text(data + "\n", encoding="utf-8")
        record_class_names(folder, class_names)
    except OSError as error:
        raise UserError(_cannot_write(folder, error)) from error


def _cannot_write(folder: Path, error: OSError) -> str:
    return f"cannot write to the results folder {folder}: {error}"


def _check_run(folder: Path, config: RunConfig, data: str) -> None:
    """That what the folder holds, if anything, is this run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results-dir {folder} is a file: give a folder")
    place = checkpoints_folder(config, folder)
    if checkpoints := list_checkpoints(place):
        manifest = _newest_manifest(checkpoints)
        if manifest is not None:
            _check_config(place, config, _config_of(manifest))
            if manifest["data"]["fingerprint"] != data:
                raise UserError(
                    f"{place} holds checkpoints of a run on other training data than "
                    f"{config.data.train}: give {_another(config)}, or the shards the run was "
                    "started with"
                )
        if not config.checkpoint.resume:
            raise UserError(
                f"{place} holds checkpoints of this run and checkpoint.resume is false: set it "
                f"to true to go on, or give {_another(config)}"
            )
    elif old := sorted((folder / "checkpoints").glob("step-????????.pt")):
        raise UserError(
            f"{folder} holds checkpoints of an older version, from which no training goes on "
            f"(their weights can be used: stage_1.ckpt or stage_2.ckpt={old[-1]}): give another "
            "--results-dir"
        )


def _newest_manifest(checkpoints: list[Checkpoint]) -> dict[str, Any] | None:
    """Of the newest checkpoint that has a readable one; which is whole is found out later."""
    for checkpoint in reversed(checkpoints):
        try:
            return read_manifest(checkpoint)
        except BrokenCheckpointError:
            continue
    return None


def _config_of(manifest: dict[str, Any]) -> RunConfig:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        json.dump(manifest["config"], file)  # JSON is YAML
        file.flush()
        return load_config(file.name)


def _another(config: RunConfig) -> str:
    """What to change to begin anew."""
    return "another checkpoint.dir" if config.checkpoint.dir else "another --results-dir"


def _check_config(place: str, config: RunConfig, theirs: RunConfig) -> None:
    changed = config.diff(theirs)
    if not changed:
        return
    new, old = config.flat(), theirs.flat()
    shown = "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    raise UserError(
        f"{place} holds checkpoints of a run of another configuration ({shown}{more}). Give "
        f"{_another(config)}, or the configuration the run was started with"
    )
