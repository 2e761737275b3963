"""An index for WebDataset tars that others made: one pass over each, and nothing is copied."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rae_xla.data import storage
from rae_xla.data.class_names import names_for
from rae_xla.data.index import (
    INDEX_FILE,
    SAMPLE,
    TABLE_FILE,
    Shard,
    ShardIndex,
    listing_fault,
    open_index,
    save_index,
)
from rae_xla.data.tar_files import tar_files
from rae_xla.data.tar_samples import DamagedTar, HashingReader, parse_label, read_samples
from rae_xla.data.worker_pool import ordered_map
from rae_xla.errors import UserError


def index_shards(
    source: str,
    out: str | None = None,
    *,
    class_names: tuple[str, ...] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> ShardIndex:
    """Index the tars of ``source``: images with a label in a ``.cls`` member beside them.

    Args:
        source: a folder of tars, one tar or a brace pattern in one folder; local or ``gs://``.
        out: the folder for the index, if it is not to lie beside the tars.
        class_names: the names of the labels; if None, their numbers.
        workers: processes, each of which reads a tar from front to back.
        progress: called with the bytes read so far and the bytes there are.

    Raises:
        UserError: if there is an index already, or naming every bad tar, if one is damaged or a
            sample has no image, no label or one that is no number; then nothing is written.
    """
    paths = tar_files(source)
    [folder, *others] = sorted({storage.split(path)[0] for path in paths})
    if others:
        raise UserError(f"{source}: one index covers one folder; index each folder by itself")
    target = folder if out is None else str(out)
    present = storage.list_files(folder)
    _check_target(folder, target, present, {storage.split(path)[1] for path in paths})
    total = sum(present[storage.split(path)[1]].size for path in paths)
    done, shards, tables, faults = 0, [], [], []
    for read in ordered_map(_read, paths, workers):
        done += read.shard.bytes
        if progress is not None:
            progress(done, total)
        fault = read.fault or listing_fault(read.shard, present)
        if fault:
            faults.append(f"{read.shard.file}: {fault}")
        shards.append(read.shard)
        tables.append(read.rows)
    if faults:
        raise UserError(
            f"{folder}: {len(faults)} of {len(shards)} tars cannot be indexed, so nothing is "
            f"written: {'; '.join(faults)}. Copy or make them again"
        )
    samples = np.concatenate(tables)
    names = names_for(int(samples["label"].max()), class_names, folder)
    storage.make_folder(target)
    save_index(target, shards, names, samples, None if target == folder else folder)
    return open_index(target)


def _check_target(
    folder: str, target: str, present: dict[str, storage.FileInfo], chosen: set[str]
) -> None:
    """Refuse to write over another index, or an index of some tars beside all of them."""
    beside = _same(folder, target)
    there = present if beside else storage.list_files(target) if storage.exists(target) else {}
    for name in (INDEX_FILE, TABLE_FILE):
        if name in there:
            raise UserError(
                f"{storage.join(target, name)} is there already: delete it if it is out of date, "
                "or give another folder with --out"
            )
    rest = sorted(n for n in present if n.lower().endswith(".tar") and n not in chosen)
    if beside and rest:
        raise UserError(
            f"{folder}: {len(rest)} other tars ({rest[0]}, …) lie in the folder: give this index a "
            "folder of its own with --out"
        )


def _same(one: str, two: str) -> bool:
    if storage.is_remote(one) or storage.is_remote(two):
        return one.rstrip("/") == two.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(two)


@dataclass(frozen=True, eq=False)
class _Read:
    """A tar as it was found, up to what is wrong with it, if anything is."""

    shard: Shard
    rows: NDArray[np.void]
    fault: str | None


def _read(path: str) -> _Read:
    rows: list[tuple[int, int, int, int]] = []
    faults: list[str] = []
    with storage.open_read(path) as raw:
        file = HashingReader(raw)
        try:
            for sample in read_samples(file):
                if (fault := sample.fault()) is not None:
                    faults.append(f"sample {sample.key}: {fault}")
                    continue
                image, label = sample.image or b"", parse_label(sample.label or b"")
                rows.append((sample.offset, sample.size, label or 0, zlib.crc32(image)))
            file.drain()
        except (DamagedTar, OSError) as error:
            # First, since the last sample before the cut may be at fault only for the cut.
            faults.insert(0, f"not a whole tar after {len(rows)} samples ({error})")
    if not rows and not faults:
        faults.append("there is no sample in it")
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    sha256, md5 = file.sha256.hexdigest(), file.md5.hexdigest()
    shard = Shard(storage.split(path)[1], len(rows), file.position, sha256, md5)
    return _Read(shard, np.array(rows, SAMPLE), faults[0] + more if faults else None)
