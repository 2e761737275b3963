"""Checkpoints of a run on a disk or in a bucket: find, verify, commit and delete them.

A checkpoint is a folder ``step-00001000`` with sharded tensors (see ``format``) and
``manifest.json``, which records the step, the run (see ``provenance``), and the size and SHA-256 of
every file. The manifest is written last and commits the checkpoint: a folder without one is ignored
by all readers and deleted by the next save.

A checkpoint that is no longer kept is deleted, or reduced to its power-function averages (see
``posthoc_ema``): its folder then has ``averages.json`` in place of the manifest.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_xla import storage
from rae_xla.checkpoint.format import THREADS, FileFacts, Folder, part_of_file
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar
from rae_xla.storage.staging import staged_input

if TYPE_CHECKING:
    from tqdm import tqdm

    from rae_xla.config import RunConfig

MANIFEST_FILE = "manifest.json"
AVERAGES_FILE = "averages.json"
"""The manifest of a checkpoint that was reduced to its power-function averages."""

AVERAGE_PREFIX = "power_ema_"
"""Start of the names of the parts that hold such averages; the width follows."""

MANIFEST_FORMAT = 1
UNFINISHED_SUFFIX = ".unfinished"
CHECKPOINTS_FOLDER = "checkpoints"

_FOLDER_NAME = re.compile(r"step-(\d{8,})")
_BLOCK_BYTES = 16 << 20
_PROGRESS_BAR_BYTES = 4e9
"""Verifying more than this takes more than a few seconds and shows a progress bar."""


class BrokenCheckpointError(UserError):
    """A committed checkpoint whose files differ from what its manifest records."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        path: of its folder, local or ``gs://``.
    """

    path: str

    @property
    def step(self) -> int:
        """Number of optimizer steps before it was saved."""
        return int(storage.split(self.path)[1].removeprefix("step-"))

    @property
    def folder(self) -> Folder:
        """Its files."""
        return Folder(self.path)

    def __str__(self) -> str:
        return self.path


def checkpoints_folder(config: RunConfig, results: str | Path) -> str:
    """Return the folder of a run's checkpoints.

    Args:
        config: of the run.
        results: its results folder, local or ``gs://``.
    """
    return config.checkpoint.dir or storage.join(str(results), CHECKPOINTS_FOLDER)


def checkpoint_path(folder: str, step: int) -> str:
    """Return the path of the checkpoint of a step in a folder of checkpoints."""
    return storage.join(folder, f"step-{step:08d}")


def list_checkpoints(folder: str) -> list[Checkpoint]:
    """Return the committed checkpoints in a folder, oldest first; none if it does not exist.

    Raises:
        OSError: if the folder cannot be listed.
    """
    names = [name for name in storage.list_folders(folder) if _FOLDER_NAME.fullmatch(name)]
    paths = [storage.join(folder, name) for name in names]
    committed = [p for p in paths if storage.exists(storage.join(p, MANIFEST_FILE))]
    return sorted(map(Checkpoint, committed), key=lambda checkpoint: checkpoint.step)


def find_checkpoints(path: str | Path) -> list[Checkpoint]:
    """Return the committed checkpoints that a path refers to, oldest first.

    Args:
        path: of one checkpoint, of a folder of checkpoints, or of a run's results folder, even if
            the run's ``checkpoint.dir`` is elsewhere; local or ``gs://``.

    Raises:
        UserError: if a folder cannot be listed.
    """
    place = str(path) if storage.is_remote(str(path)) else str(Path(path).expanduser())
    try:
        if storage.exists(storage.join(place, MANIFEST_FILE)):
            return [Checkpoint(place.rstrip("/"))]
        if found := list_checkpoints(place):
            return found
        if found := list_checkpoints(storage.join(place, CHECKPOINTS_FOLDER)):
            return found
        configured = _configured_folder(place)
        return list_checkpoints(configured) if configured else []
    except OSError as error:
        raise UserError(
            f"cannot list the checkpoints of {path} ({error}): check the path and the access to it"
        ) from error


def newest_checkpoint(path: str | Path) -> Checkpoint:
    """Return the newest of ``find_checkpoints``.

    Raises:
        UserError: if there is none, or a folder cannot be listed.
    """
    found = find_checkpoints(path)
    if not found:
        if not storage.is_remote(str(path)) and not Path(path).expanduser().exists():
            raise UserError(f"{path} does not exist: give a checkpoint or a results folder")
        raise UserError(
            f"{path} holds no checkpoint: give a folder step-…, a folder that holds such folders, "
            "or a results folder"
        )
    return found[-1]


def _configured_folder(results: str) -> str | None:
    """Return ``checkpoint.dir`` of the run with these results, if it set one."""
    path = storage.join(results, "config.yaml")
    if not storage.exists(path):
        return None
    from rae_xla.config import load_config

    with staged_input(path) as file:
        return load_config(file).checkpoint.dir


def read_checkpoint_manifest(checkpoint: Checkpoint, name: str = MANIFEST_FILE) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest.

    Args:
        checkpoint: to read.
        name: ``MANIFEST_FILE``, or ``AVERAGES_FILE`` of one that was reduced.

    Raises:
        BrokenCheckpointError: if the manifest is missing or damaged.
        UserError: if a later version wrote it.
        OSError: if a bucket cannot be reached.
    """
    with broken_if_unreadable(checkpoint, name):
        content = checkpoint.folder.read_bytes(name)
    try:
        manifest = json.loads(content)
        version = manifest["format"]
        files = {name: (f["size"], f["sha256"]) for name, f in manifest["files"].items()}
        valid = isinstance(manifest["step"], int) and bool(files)
    except (ValueError, KeyError, TypeError, AttributeError):
        valid, version = False, MANIFEST_FORMAT
    if version != MANIFEST_FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} has format {version}; this version of rae_xla reads format "
            f"{MANIFEST_FORMAT}: use the version that wrote it"
        )
    if not valid:
        raise BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {name} is damaged")
    return dict(manifest)


def verify(
    checkpoint: Checkpoint,
    manifest: Mapping[str, Any],
    *,
    parts: Collection[str] | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Compare size and SHA-256 of a checkpoint's files with its manifest.

    Args:
        checkpoint: to verify.
        manifest: of this checkpoint.
        parts: verify the table of shards and the files of these parts; None: all files.
        share: (i, n): verify every n-th file from the i-th on, so that n processes share the work.

    Raises:
        BrokenCheckpointError: if a file is missing or differs; it names the first one.
        OSError: if a bucket cannot be reached.
    """
    files = sorted(
        name
        for name in manifest["files"]
        if parts is None or part_of_file(name) is None or part_of_file(name) in parts
    )
    chosen = files[share[0] :: share[1]]
    total = sum(manifest["files"][name]["size"] for name in chosen)
    with (
        progress_bar(
            total=total, desc=f"verify {storage.split(checkpoint.path)[1]}", unit="B",
            unit_scale=True, disable=total < _PROGRESS_BAR_BYTES, leave=False,
        ) as bar,
        ThreadPoolExecutor(THREADS, "checkpoint-verify") as pool,
    ):  # fmt: skip
        for _ in pool.map(lambda f: _verify_file(checkpoint, f, manifest["files"][f], bar), chosen):
            pass


def _verify_file(
    checkpoint: Checkpoint, name: str, expected: Mapping[str, Any], bar: tqdm[Any]
) -> None:
    path = storage.join(checkpoint.path, name)
    broken = f"checkpoint {checkpoint} is broken: {name}"
    with broken_if_unreadable(checkpoint, name):
        size = storage.size(path)
        if size != expected["size"]:
            raise BrokenCheckpointError(f"{broken} has {size} bytes, expected {expected['size']}")
        digest = hashlib.sha256()
        with storage.open_read(path) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                bar.update(len(block))
    if digest.hexdigest() != expected["sha256"]:
        raise BrokenCheckpointError(f"{broken} does not match its checksum in {MANIFEST_FILE}")


def unlisted_files(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of files in a checkpoint's folder that its manifest does not list."""
    listed = {*manifest["files"], MANIFEST_FILE, AVERAGES_FILE}
    return sorted(storage.list_files(checkpoint.path).keys() - listed)


@contextlib.contextmanager
def broken_if_unreadable(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Turn the error of reading a file into ``BrokenCheckpointError``.

    Not so if a bucket cannot be reached: that does not prove that the file is damaged.
    """
    try:
        yield
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        if storage.is_remote(checkpoint.path) and not missing:
            raise
        reason = "is missing" if missing else f"cannot be read: {error}"
        raise BrokenCheckpointError(
            f"checkpoint {checkpoint} is broken: {name} {reason}"
        ) from error


def saving_path(path: str) -> str:
    """Return the folder to write a checkpoint to before it is committed as ``path``.

    On a disk that is a folder with another name, which ``commit`` renames. A bucket cannot rename
    a folder: the files are written in place, and the manifest alone commits them.
    """
    return path if storage.is_remote(path) else path + UNFINISHED_SUFFIX


def prepare_folder(folder: str, path: str) -> None:
    """Create the folder to save a checkpoint to, and delete incomplete checkpoints first.

    Args:
        folder: of the run's checkpoints.
        path: of the new checkpoint.

    Raises:
        OSError: if that fails.
    """
    storage.make_folder(folder)
    for incomplete in incomplete_checkpoints(folder):
        delete_checkpoint(incomplete)
    target = saving_path(path)
    committed = (storage.join(path, name) for name in (MANIFEST_FILE, AVERAGES_FILE))
    if target == path and any(map(storage.exists, committed)):
        delete_checkpoint(path)
    storage.make_folder(target)


def commit(path: str, files: Mapping[str, FileFacts], facts: Mapping[str, Any]) -> None:
    """Commit the files in ``saving_path(path)``: write the manifest, and rename a local folder.

    Args:
        path: of the checkpoint.
        files: all that were written.
        facts: the other entries of the manifest.

    Raises:
        OSError: if a file is incomplete, or writing fails.
    """
    target = saving_path(path)
    written = storage.list_files(target)
    for name, expected in files.items():
        size = written[name].size if name in written else None
        if size != expected.size:
            raise OSError(f"{storage.join(target, name)} has {size} bytes, wrote {expected.size}")
    manifest = {**facts, "files": {name: asdict(file) for name, file in sorted(files.items())}}
    text = json.dumps(manifest, indent=1) + "\n"
    storage.write_bytes(storage.join(target, MANIFEST_FILE), text.encode())
    if target == path:
        return
    _sync_folder(target)
    if os.path.exists(path):
        delete_checkpoint(path)
    os.rename(target, path)
    _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    """Flush a local folder's entries to the disk, so that a crash cannot undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_checkpoint(path: str) -> None:
    """Delete a complete, reduced or incomplete checkpoint.

    The manifest goes first, so that an interruption leaves an incomplete checkpoint rather than a
    broken one.

    Raises:
        OSError: if that fails.
    """
    files = storage.list_files(path)
    for name in sorted(files, key=lambda name: name not in (MANIFEST_FILE, AVERAGES_FILE)):
        with contextlib.suppress(FileNotFoundError):
            storage.remove(storage.join(path, name))
    if not storage.is_remote(path):
        shutil.rmtree(path, ignore_errors=True)


def incomplete_checkpoints(folder: str) -> list[str]:
    """Return the paths of the checkpoints in a folder that interrupted saves left uncommitted."""
    found = []
    for name in storage.list_folders(folder):
        path = storage.join(folder, name)
        if _FOLDER_NAME.fullmatch(name.removesuffix(UNFINISHED_SUFFIX)) and (
            name.endswith(UNFINISHED_SUFFIX)
            or not any(
                storage.exists(storage.join(path, f)) for f in (MANIFEST_FILE, AVERAGES_FILE)
            )
        ):
            found.append(path)
    return sorted(found)


def prunable_steps(steps: Collection[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Return the steps of committed checkpoints that the retention settings do not keep.

    Args:
        steps: of all committed checkpoints.
        keep_last: keep this many of the newest.
        keep_every: also keep those whose step is a multiple of this number.
    """
    newest = sorted(steps)[-keep_last:]
    return [
        s for s in sorted(steps) if s not in newest and not (keep_every and s % keep_every == 0)
    ]
