"""A run's checkpoints on a disk or in a bucket: which are there, what they hold, whether whole.

A checkpoint is a folder ``step-00001000``: sharded tensors (``runtime.checkpoint``) and
``manifest.json``, which is written last. A folder without it does not exist for anyone. The
manifest has the size and the SHA-256 of every file, the step, and what the run was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rae_xla.data import storage
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

MANIFEST = "manifest.json"
TIES = "belongs_with"
"""Where it says which encoder and statistics a diffusion transformer was trained with."""
FORMAT = 1
UNFINISHED = ".unfinished"
CHECKPOINTS = "checkpoints"

_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 16 << 20
_SHOWN_FROM = 4e9  # bytes: what takes longer than some seconds to check gets a progress bar


class BrokenCheckpointError(UserError):
    """A committed checkpoint that is not what its manifest says."""


@dataclass(frozen=True)
class Folder:
    """The files of a checkpoint; see ``runtime.checkpoint_files.Files``."""

    path: str

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a file that is there, whole, when the block ends, and else is not."""
        return storage.create(storage.join(self.path, name))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """A part of a file."""
        return storage.read_range(storage.join(self.path, name), start, length)

    def read_bytes(self, name: str) -> bytes:
        """All of a file."""
        return storage.read_bytes(storage.join(self.path, name))


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, by its folder (local or ``gs://``)."""

    path: str

    @property
    def step(self) -> int:
        """Optimizer steps it was made after."""
        return int(storage.split(self.path)[1].removeprefix("step-"))

    @property
    def folder(self) -> Folder:
        """Its files."""
        return Folder(self.path)

    def __str__(self) -> str:
        return self.path


def checkpoint_path(folder: str, step: int) -> str:
    """Where the checkpoint of a step is, in a folder of checkpoints."""
    return storage.join(folder, f"step-{step:08d}")


def list_checkpoints(folder: str) -> list[Checkpoint]:
    """The committed checkpoints that lie directly in ``folder``, oldest first.

    Raises:
        OSError: it cannot be reached; that it does not exist is no error.
    """
    named = [name for name in storage.list_folders(folder) if _NAME.fullmatch(name)]
    paths = [storage.join(folder, name) for name in named]
    committed = [p for p in paths if storage.exists(storage.join(p, MANIFEST))]
    return sorted(map(Checkpoint, committed), key=lambda checkpoint: checkpoint.step)


def find_checkpoints(path: str | Path) -> list[Checkpoint]:
    """The committed checkpoints a path stands for, oldest first: one of them, their folder, or a
    run's results folder, wherever its ``checkpoint.dir`` has them.

    Raises:
        UserError: the place cannot be reached.
    """
    place = str(path) if storage.is_remote(str(path)) else str(Path(path).expanduser())
    try:
        if storage.exists(storage.join(place, MANIFEST)):
            return [Checkpoint(place.rstrip("/"))]
        if found := list_checkpoints(place):
            return found
        if found := list_checkpoints(storage.join(place, CHECKPOINTS)):
            return found
        elsewhere = _configured_folder(place)
        return list_checkpoints(elsewhere) if elsewhere else []
    except OSError as error:
        raise UserError(f"checkpoints of {path} cannot be listed: {error}") from error


def newest_checkpoint(path: str | Path) -> Checkpoint:
    """The newest of ``find_checkpoints``.

    Raises:
        UserError: there is none, no such folder, or the place cannot be reached.
    """
    found = find_checkpoints(path)
    if not found:
        if not storage.is_remote(str(path)) and not Path(path).expanduser().exists():
            raise UserError(f"there is no {path}, so no checkpoint either")
        raise UserError(
            f"{path} holds no checkpoint: give a folder step-…, the folder of such folders, or a "
            "results folder"
        )
    return found[-1]


def _configured_folder(place: str) -> str | None:
    """``checkpoint.dir`` of the run whose results folder this is."""
    if storage.is_remote(place) or not (config := Path(place) / "config.yaml").is_file():
        return None
    from rae_xla.config import load_config

    return load_config(str(config)).checkpoint.dir


def read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        BrokenCheckpointError: it cannot be read or understood.
        OSError: a bucket cannot be reached.
    """
    with _broken_if_missing(checkpoint):
        content = checkpoint.folder.read_bytes(MANIFEST)
    try:
        manifest = json.loads(content)
        written = manifest["format"]
        files = {name: (f["size"], f["sha256"]) for name, f in manifest["files"].items()}
        valid = isinstance(manifest["step"], int) and bool(files)
    except (ValueError, KeyError, TypeError, AttributeError):
        valid, written = False, FORMAT
    if written != FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} is of format {written}; this version reads {FORMAT}"
        )
    if not valid:
        raise BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {MANIFEST} is damaged")
    return dict(manifest)


def verify(
    checkpoint: Checkpoint,
    manifest: Mapping[str, Any],
    *,
    parts: Collection[str] | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """See that files have the size and the checksum they were written with.

    Args:
        checkpoint: which.
        manifest: its own.
        parts: whose files are checked; default: all.
        share: (i, n): check every n-th file from the i-th on; n processes share the work.

    Raises:
        BrokenCheckpointError: naming the first file that is missing or differs.
        OSError: a bucket cannot be reached.
    """
    files = sorted(
        name
        for name in manifest["files"]
        if parts is None or "-" not in name or name.rpartition("-")[0] in parts
    )
    chosen = files[share[0] :: share[1]]
    total = sum(manifest["files"][name]["size"] for name in chosen)
    with (
        progress_bar(
            total=total, desc=f"check {storage.split(checkpoint.path)[1]}", unit="B",
            unit_scale=True, disable=total < _SHOWN_FROM, leave=False,
        ) as bar,
        ThreadPoolExecutor(8, "checkpoint-check") as pool,
    ):  # fmt: skip
        for _ in pool.map(lambda f: _verify_file(checkpoint, f, manifest["files"][f], bar), chosen):
            pass


def _verify_file(
    checkpoint: Checkpoint, name: str, said: Mapping[str, Any], bar: tqdm[Any]
) -> None:
    path = storage.join(checkpoint.path, name)
    broken = f"checkpoint {checkpoint} is broken: {name}"
    with _broken_if_missing(checkpoint, name):
        size = storage.size(path)
        if size != said["size"]:
            raise BrokenCheckpointError(f"{broken} has {size} bytes instead of {said['size']}")
        digest = hashlib.sha256()
        with storage.open_read(path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                bar.update(len(block))
    if digest.hexdigest() != said["sha256"]:
        raise BrokenCheckpointError(f"{broken} does not have the checksum it was written with")


@contextlib.contextmanager
def _broken_if_missing(checkpoint: Checkpoint, name: str = MANIFEST) -> Iterator[None]:
    """A file that is gone, or that a local disk cannot read, breaks its checkpoint; a bucket that
    cannot be reached does not.
    """
    try:
        yield
    except OSError as error:
        if storage.is_remote(checkpoint.path) and not isinstance(error, FileNotFoundError):
            raise
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        )
        raise BrokenCheckpointError(
            f"checkpoint {checkpoint} is broken: {name} {reason}"
        ) from error


def remove(path: str) -> None:
    """Delete a checkpoint, or the rests of one: the manifest first, so that it is never half there.

    Raises:
        OSError: it could not be done.
    """
    files = storage.list_files(path)
    for name in sorted(files, key=lambda name: name != MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            storage.remove(storage.join(path, name))
    if not storage.is_remote(path):
        shutil.rmtree(path, ignore_errors=True)


def rests(folder: str) -> list[str]:
    """What earlier attempts left in a folder of checkpoints: folders that nobody committed."""
    found = []
    for name in storage.list_folders(folder):
        path = storage.join(folder, name)
        if _NAME.fullmatch(name.removesuffix(UNFINISHED)) and (
            name.endswith(UNFINISHED) or not storage.exists(storage.join(path, MANIFEST))
        ):
            found.append(path)
    return sorted(found)


def superfluous(steps: Collection[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Of the steps of committed checkpoints, those that the two settings do not keep."""
    newest = sorted(steps)[-keep_last:]
    return [
        s for s in sorted(steps) if s not in newest and not (keep_every and s % keep_every == 0)
    ]


def sync_folder(path: str) -> None:
    """Bring a local folder's entries to the disk, so that a crash cannot undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
