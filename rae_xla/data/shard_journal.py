"""What an interrupted attempt at making shards has finished, so that the next one goes on there.

``.writing`` marks a folder of shards that is being written. It names the process that does, and
holds the recipe: what the shards are made of and how. Beside it lies a small file for every
finished shard, with its rows of the table. All of them go when the index is there.

Whether an attempt on another machine is still going on cannot be known, so the newer one takes the
folder over by a random word of its own in ``.writing``, and the older one, which looks there before
all that it writes, ends.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla.data import storage
from rae_xla.data.index import INDEX_FILE, SAMPLE, TABLE_FILE, Shard, listing_fault
from rae_xla.errors import UserError

WRITING_FILE = ".writing"
"""Marks a folder being written; what lies beside it may be overwritten by the next attempt."""

Recipe = Mapping[str, Any]
"""What must be equal for shards to be equal, by a name for people; the values are JSON's."""


@dataclass(frozen=True, eq=False)
class FinishedShard:
    """A shard that is complete, and its samples' rows of the index."""

    shard: Shard
    rows: NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Journal:
    """The notes of this process on the folder it writes to; from ``claim``."""

    folder: str
    word: str
    finished: list[FinishedShard]

    def check(self) -> None:
        """Make sure that no other process has claimed the folder since.

        Raises:
            UserError: if one has; what this process would write now could be in its way.
        """
        try:
            owner, _ = _read_mark(self.folder)
        except FileNotFoundError:
            raise UserError(
                f"{self.folder}: another process has finished the shards here, or the folder was "
                "deleted, while this one was writing them: run the same command again to see"
            ) from None
        if owner.get("word") != self.word:
            raise UserError(
                f"{self.folder}: another process is writing here ({owner.get('host')}, process "
                f"{owner.get('pid')}), so this one ends: let that one finish"
            )

    def record(self, shard: Shard, rows: NDArray[np.void]) -> None:
        """Note that a shard is complete, once it is."""
        self.check()
        buffer = io.BytesIO(json.dumps(vars(shard)).encode() + b"\n")
        buffer.seek(0, io.SEEK_END)
        np.save(buffer, rows)
        storage.write_bytes(storage.join(self.folder, _entry_name(shard.file)), buffer.getvalue())

    def close(self) -> None:
        """Remove the notes, once the index is written."""
        self.check()
        _clear(self.folder)


def check_target(folder: str) -> dict[str, storage.FileInfo]:
    """Make sure that shards may be written to ``folder``; gives what lies in it.

    Raises:
        UserError: if the folder holds finished shards or something else, or if another process of
            this machine is writing to it.
    """
    present = storage.list_files(folder) if storage.exists(folder) else {}
    if WRITING_FILE in present:
        owner, _ = _read_mark(folder)
        if _is_alive(owner):
            raise UserError(
                f"{folder}: shards are being written here by process {owner['pid']}: let it "
                "finish, or stop it and run this again"
            )
        return present
    if INDEX_FILE in present:
        raise UserError(_already(folder))
    # An attempt that was killed at its very first file leaves no more than half of that.
    half = WRITING_FILE + storage.TEMPORARY_MARK
    others = [n for n in [*present, *_folders_in(folder)] if not n.startswith(half)]
    if others:
        raise UserError(
            f"{folder}: the folder is not empty ({min(others)} lies in it); shards need one "
            "of their own"
        )
    return present


def _folders_in(folder: str) -> list[str]:
    if storage.is_remote(folder) or not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir()]


def clear_finished(folder: str, recipe: Recipe) -> bool:
    """Whether an attempt wrote all of this, the index too; its notes, if it left any, are removed.

    Raises:
        UserError: as ``check_target`` does, and if the finished shards are of another recipe.
    """
    if INDEX_FILE not in check_target(folder):
        return False
    if _read_mark(folder)[1] != recipe:
        raise UserError(_already(folder))
    _clear(folder)
    return True


def claim(folder: str, recipe: Recipe) -> Journal:
    """Mark ``folder`` as being written by this process; says what an earlier attempt has finished.

    What the attempt left besides is removed. It may still be going on, on another machine: it ends
    when it finds the mark of this process.

    Args:
        folder: local or ``gs://``.
        recipe: with at least ``prefix``, how the names of the shards begin.

    Raises:
        UserError: as ``check_target`` does, and if there is work of an attempt with another recipe.
    """
    present = check_target(folder)
    if INDEX_FILE in present:
        raise UserError(_already(folder))
    storage.make_folder(folder)
    begun = _read_mark(folder)[1] if WRITING_FILE in present else {}
    prefixes = {str(mark["prefix"]) for mark in (begun, recipe) if "prefix" in mark}
    finished = _finished(folder, str(begun.get("prefix", recipe["prefix"])), present)
    if finished:
        _check_recipe(folder, begun, recipe, finished)
    word = uuid.uuid4().hex
    # Before anything is removed, so that a process that misses it finds out why.
    _write_mark(folder, word, recipe)
    kept = {WRITING_FILE}
    for item in finished:
        kept |= {item.shard.file, _entry_name(item.shard.file)}
    ours = _names_of(prefixes)
    for name in present:
        if name not in kept and ours.fullmatch(name):
            _remove(folder, name)
    return Journal(folder, word, finished)


def _already(folder: str) -> str:
    return f"{folder}: there are finished shards already; delete the folder or choose another"


def _names_of(prefixes: Iterable[str]) -> re.Pattern[str]:
    """The names of all files that attempts with these prefixes write, half-written ones too."""
    shard = rf"({'|'.join(map(re.escape, prefixes))})-\d{{6,}}"
    mark, table, index = map(re.escape, (WRITING_FILE, TABLE_FILE, INDEX_FILE))
    half = rf"{re.escape(storage.TEMPORARY_MARK)}\w+"
    return re.compile(rf"({mark}(-{shard})?|{shard}\.tar|{table}|{index})({half})?")


def _clear(folder: str) -> None:
    """Remove the notes; ``.writing`` last, so that an interrupted call can be made up for."""
    for name in storage.list_files(folder):
        if name.startswith((f"{WRITING_FILE}-", f"{WRITING_FILE}{storage.TEMPORARY_MARK}")):
            _remove(folder, name)
    _remove(folder, WRITING_FILE)


def _remove(folder: str, name: str) -> None:
    # Another process may have been faster.
    with contextlib.suppress(FileNotFoundError):
        storage.remove(storage.join(folder, name))


def _write_mark(folder: str, word: str, recipe: Recipe) -> None:
    owner = {"word": word, "host": socket.gethostname(), "pid": os.getpid()}
    owner["started"] = _started(os.getpid())
    content = json.dumps({"owner": owner, "recipe": dict(recipe)}, indent=1).encode()
    storage.write_bytes(storage.join(folder, WRITING_FILE), content)


def _read_mark(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Who writes to a folder and the recipe, as far as ``.writing`` tells.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        mark = json.loads(storage.read_bytes(storage.join(folder, WRITING_FILE)))
        owner, recipe = mark["owner"], mark["recipe"]
    except (ValueError, TypeError, KeyError):
        return {}, {}
    if not isinstance(owner, dict) or not isinstance(recipe, dict):
        return {}, {}
    return owner, recipe


def _is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether an owner is known to be running: a process of this machine, and not this one."""
    pid, started = owner.get("pid"), owner.get("started")
    if owner.get("host") != socket.gethostname() or pid == os.getpid() or started is None:
        return False
    return isinstance(pid, int) and _started(pid) == started


def _started(pid: int) -> str | None:
    """When a process started, which tells it from a later one of its number; None if it ended.

    And None where there is no ``/proc``.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which may hold anything: the state (Z: killed, its parent has not noticed)
    # is field 3, the start, in ticks since the machine's, field 22. See proc(5).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _entry_name(shard_file: str) -> str:
    # Without ".tar", so that nobody takes it for a shard.
    return f"{WRITING_FILE}-{shard_file.removesuffix('.tar')}"


def _finished(
    folder: str, prefix: str, present: Mapping[str, storage.FileInfo]
) -> list[FinishedShard]:
    """The first shards that are on record and, by the listing, as they were recorded."""
    finished: list[FinishedShard] = []
    while (name := _entry_name(f"{prefix}-{len(finished):06d}.tar")) in present:
        line, _, table = storage.read_bytes(storage.join(folder, name)).partition(b"\n")
        try:
            shard = Shard(**json.loads(line))
            rows: NDArray[np.void] = np.load(io.BytesIO(table), allow_pickle=False)
        except (ValueError, TypeError, EOFError):
            break
        sound = rows.dtype == SAMPLE and len(rows) == shard.samples
        if not sound or listing_fault(shard, present) is not None:
            break
        finished.append(FinishedShard(shard, rows))
    return finished


def _check_recipe(
    folder: str, begun: Recipe, recipe: Recipe, finished: list[FinishedShard]
) -> None:
    if recipe == begun:
        return
    other = [
        f"{name} ({_short(begun.get(name))} then, {_short(recipe.get(name))} now)"
        for name in {**begun, **recipe}
        if begun.get(name) != recipe.get(name)
    ]
    raise UserError(
        f"{folder}: an interrupted attempt left {len(finished)} finished shards here, made "
        f"otherwise: {', '.join(other)}. To go on, run the command as it was then; to start "
        "afresh, delete the folder"
    )


def _short(value: Any) -> str:
    """A value of a recipe in a few characters; hashes by how they begin."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:8]}…"
