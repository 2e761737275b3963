"""What an interrupted attempt at making shards has finished, so that the next one goes on there.

``.writing`` marks a folder of shards that is being written and holds the recipe: what the shards
are made of and how. Beside it lies a small file for every finished shard, with its rows of the
table. All of them go when the index is there.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
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


def check_target(folder: str) -> dict[str, storage.FileInfo]:
    """Make sure that shards may be written to ``folder``; gives what lies in it.

    Raises:
        UserError: if the folder holds finished shards or something else.
    """
    present = storage.list_files(folder) if storage.exists(folder) else {}
    if INDEX_FILE in present:
        raise UserError(
            f"{folder}: there are finished shards already; delete the folder or choose another"
        )
    if present and WRITING_FILE not in present:
        raise UserError(
            f"{folder}: the folder is not empty ({sorted(present)[0]} lies in it); shards need one "
            "of their own"
        )
    return present


def claim(folder: str, prefix: str, recipe: Recipe | None = None) -> list[FinishedShard]:
    """Mark ``folder`` as being written, and say what of it an earlier attempt has finished.

    What the attempt left besides is removed; without a ``recipe`` all of it is.

    Raises:
        UserError: if the folder holds finished shards, something else, or the work of an attempt
            with another recipe.
    """
    present = check_target(folder)
    storage.make_folder(folder)
    finished: list[FinishedShard] = []
    if WRITING_FILE in present:
        finished = _finished(folder, prefix, present)
        if finished:
            _check_recipe(folder, _read_recipe(folder), recipe, finished)
    kept = {item.shard.file for item in finished}
    kept |= {_entry_name(name) for name in kept}
    shard = rf"{re.escape(prefix)}-\d{{6}}"
    ours = re.compile(
        rf"({re.escape(WRITING_FILE)}-{shard}|{shard}\.tar|{re.escape(TABLE_FILE)})(\.tmp-\w+)?"
    )
    for name in present:
        if name not in kept and ours.fullmatch(name):
            storage.remove(storage.join(folder, name))
    content = b"" if recipe is None else json.dumps(recipe, indent=1).encode()
    storage.write_bytes(storage.join(folder, WRITING_FILE), content)
    return finished


def record(folder: str, shard: Shard, rows: NDArray[np.void]) -> None:
    """Note that a shard is complete, once it is."""
    buffer = io.BytesIO(json.dumps(vars(shard)).encode() + b"\n")
    buffer.seek(0, io.SEEK_END)
    np.save(buffer, rows)
    storage.write_bytes(storage.join(folder, _entry_name(shard.file)), buffer.getvalue())


def close(folder: str, shards: list[Shard]) -> None:
    """Remove the journal of a folder whose index is written."""
    present = storage.list_files(folder)
    for shard in shards:
        if _entry_name(shard.file) in present:
            storage.remove(storage.join(folder, _entry_name(shard.file)))
    storage.remove(storage.join(folder, WRITING_FILE))


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


def _read_recipe(folder: str) -> dict[str, Any]:
    try:
        recipe = json.loads(storage.read_bytes(storage.join(folder, WRITING_FILE)))
    except ValueError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _check_recipe(
    folder: str, begun: Recipe, recipe: Recipe | None, finished: list[FinishedShard]
) -> None:
    if recipe == begun:
        return
    asked = recipe or {}
    other = [
        f"{name} ({_short(begun.get(name))} then, {_short(asked.get(name))} now)"
        for name in {**begun, **asked}
        if begun.get(name) != asked.get(name)
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
