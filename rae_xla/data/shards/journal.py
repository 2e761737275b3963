"""The journal of a folder of shards being written, from which an interrupted attempt resumes.

The file ``.writing`` marks such a folder. It names the process that writes, and the recipe: what
the shards are made from, and how. A small file next to it for every finished shard has the shard's
rows of the sample table. All of them are removed once the index is written.

Whether an attempt on another machine is still running cannot be determined, so the newer attempt
takes the folder over: it writes a random token to ``.writing``. The older one compares the token
before everything that it writes, and stops.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.shards.index import (
    INDEX_FILE,
    SAMPLE,
    TABLE_FILE,
    WRITING_FILE,
    Shard,
    listing_fault,
)
from rae_xla.data.shards.texts import TEXT_FILES
from rae_xla.errors import UserError
from rae_xla.storage.owner import is_alive, this_process

TOKEN_KEY = "word"
"""Key of the token in ``.writing``; kept from earlier versions, whose attempts compare it."""

Recipe = Mapping[str, Any]
"""What determines the content of shards: readable names, and JSON values."""


@dataclass(frozen=True, eq=False)
class FinishedShard:
    """A complete shard, and its rows of the sample table."""

    shard: Shard
    rows: NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Journal:
    """The journal of this process; from ``claim``.

    Attributes:
        folder: being written.
        token: identifies this attempt.
        finished: shards that an earlier attempt finished.
    """

    folder: str
    token: str
    finished: list[FinishedShard]

    def check(self) -> None:
        """Raise if another process has claimed the folder since, and this one must not write.

        Raises:
            UserError: another process writes to the folder, or has finished.
        """
        try:
            owner, _ = _read_mark(self.folder)
        except FileNotFoundError:
            raise UserError(
                f"{self.folder}: another process has finished the shards here, or the folder was "
                "deleted, while this process was writing: run the same command again to find out"
            ) from None
        if owner.get(TOKEN_KEY) != self.token:
            raise UserError(
                f"{self.folder}: another process is writing here ({owner.get('host')}, process "
                f"{owner.get('pid')}), so this one stops: let the other one finish"
            )

    def record(self, shard: Shard, rows: NDArray[np.void]) -> None:
        """Record a complete shard."""
        self.check()
        buffer = io.BytesIO(json.dumps(vars(shard)).encode() + b"\n")
        buffer.seek(0, io.SEEK_END)
        np.save(buffer, rows)
        storage.write_bytes(storage.join(self.folder, _entry_name(shard.file)), buffer.getvalue())

    def close(self) -> None:
        """Remove the journal, after the index was written."""
        self.check()
        _clear(self.folder)


def check_target(folder: str) -> dict[str, storage.FileInfo]:
    """Raise if shards may not be written to ``folder``; return its files.

    Raises:
        UserError: the folder has finished shards or other files, or another process of this
            machine is writing to it.
    """
    present = storage.list_files(folder) if storage.exists(folder) else {}
    if WRITING_FILE in present:
        owner, _ = _read_mark(folder)
        if is_alive(owner):
            raise UserError(
                f"{folder}: shards are being written here by process {owner['pid']}: let it "
                "finish, or stop it and run this command again"
            )
        return present
    if INDEX_FILE in present:
        raise UserError(_finished_message(folder))
    # An attempt that was killed while it wrote its first file leaves only a part of that.
    partial = WRITING_FILE + storage.TEMPORARY_MARK
    others = [n for n in [*present, *_subfolders(folder)] if not n.startswith(partial)]
    if others:
        raise UserError(
            f"{folder}: the folder is not empty (it contains {min(others)}); choose a new or empty "
            "folder for the shards"
        )
    return present


def _subfolders(folder: str) -> list[str]:
    return [] if storage.is_remote(folder) else storage.list_folders(folder)


def clear_finished(folder: str, recipe: Recipe) -> bool:
    """Return whether the folder is complete, and if so remove a journal that was left there.

    Raises:
        UserError: as for ``check_target``, or the shards were made with another recipe.
    """
    if INDEX_FILE not in check_target(folder):
        return False
    if _read_mark(folder)[1] != recipe:
        raise UserError(_finished_message(folder))
    _clear(folder)
    return True


def claim(folder: str, recipe: Recipe) -> Journal:
    """Mark ``folder`` as being written by this process, and keep what an attempt has finished.

    Other files of that attempt are removed. If it is still running on another machine, it stops
    when it finds the mark of this process.

    Args:
        folder: local or ``gs://``.
        recipe: has at least ``prefix``, with which the names of the shards begin.

    Returns:
        The journal, with the shards that are finished.

    Raises:
        UserError: as for ``check_target``, or an attempt with another recipe has finished shards.
    """
    present = check_target(folder)
    if INDEX_FILE in present:
        raise UserError(_finished_message(folder))
    storage.make_folder(folder)
    begun = _read_mark(folder)[1] if WRITING_FILE in present else {}
    prefixes = {str(mark["prefix"]) for mark in (begun, recipe) if "prefix" in mark}
    finished = _finished(folder, str(begun.get("prefix", recipe["prefix"])), present)
    if finished:
        _check_recipe(folder, begun, recipe, finished)
    token = uuid.uuid4().hex
    # Before anything is removed, so that a process whose files disappear finds the reason.
    _write_mark(folder, token, recipe)
    kept = {WRITING_FILE}
    for item in finished:
        kept |= {item.shard.file, _entry_name(item.shard.file)}
    ours = _names_of(prefixes)
    for name in present:
        if name not in kept and ours.fullmatch(name):
            _remove(folder, name)
    return Journal(folder, token, finished)


def _finished_message(folder: str) -> str:
    return f"{folder}: the folder has finished shards already; delete it or choose another"


def _names_of(prefixes: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for all files that attempts with these prefixes write, partial ones too."""
    shard = rf"({'|'.join(map(re.escape, prefixes))})-\d{{6,}}"
    mark, table, index = map(re.escape, (WRITING_FILE, TABLE_FILE, INDEX_FILE))
    table = "|".join([table, *map(re.escape, TEXT_FILES)])
    partial = rf"{re.escape(storage.TEMPORARY_MARK)}\w+"
    return re.compile(rf"({mark}(-{shard})?|{shard}\.tar|{table}|{index})({partial})?")


def _clear(folder: str) -> None:
    """Remove the journal; ``.writing`` last, so that an interrupted call can be repeated."""
    for name in storage.list_files(folder):
        if name.startswith((f"{WRITING_FILE}-", f"{WRITING_FILE}{storage.TEMPORARY_MARK}")):
            _remove(folder, name)
    _remove(folder, WRITING_FILE)


def _remove(folder: str, name: str) -> None:
    # Another process may have removed it.
    with contextlib.suppress(FileNotFoundError):
        storage.remove(storage.join(folder, name))


def _write_mark(folder: str, token: str, recipe: Recipe) -> None:
    owner = {TOKEN_KEY: token, **this_process()}
    content = json.dumps({"owner": owner, "recipe": dict(recipe)}, indent=1).encode()
    storage.write_bytes(storage.join(folder, WRITING_FILE), content)


def _read_mark(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the owner and the recipe from ``.writing``; empty if it is not readable.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        mark = json.loads(storage.read_bytes(storage.join(folder, WRITING_FILE)))
        owner, recipe = mark["owner"], mark["recipe"]
    except (ValueError, TypeError, KeyError):
        return {}, {}
    if not isinstance(owner, dict) or not isinstance(recipe, dict):
        return {}, {}
    return owner, recipe


def _entry_name(shard_file: str) -> str:
    # Without ".tar", so that no reader takes it for a shard.
    return f"{WRITING_FILE}-{shard_file.removesuffix('.tar')}"


def _finished(
    folder: str, prefix: str, present: Mapping[str, storage.FileInfo]
) -> list[FinishedShard]:
    """Return the first shards that are recorded and that the listing does not contradict."""
    finished: list[FinishedShard] = []
    while (name := _entry_name(f"{prefix}-{len(finished):06d}.tar")) in present:
        line, _, table = storage.read_bytes(storage.join(folder, name)).partition(b"\n")
        try:
            shard = Shard(**json.loads(line))
            rows: NDArray[np.void] = np.load(io.BytesIO(table), allow_pickle=False)
        except (ValueError, TypeError, EOFError):
            break
        consistent = rows.dtype == SAMPLE and len(rows) == shard.samples
        if not consistent or listing_fault(shard, present) is not None:
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
        f"{folder}: an interrupted attempt left {len(finished)} finished shards here with other "
        f"settings: {', '.join(other)}. To resume it, run the command as before; to start again, "
        "delete the folder"
    )


def _short(value: Any) -> str:
    """Return a value of a recipe in a few characters; a hash is abbreviated."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:8]}…"
