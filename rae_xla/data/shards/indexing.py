"""Index existing WebDataset tar files: one pass over each, without copying them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.class_names import names_for
from rae_xla.data.image_decoding import ROTATED, is_rotated
from rae_xla.data.image_finder import ImageNotes, LeftOut
from rae_xla.data.shards.index import (
    INDEX_FILE,
    SAMPLE,
    TABLE_FILE,
    Shard,
    ShardIndex,
    listing_fault,
    open_index,
    read_index,
    save_index,
)
from rae_xla.data.shards.tar_faults import DamagedTarError, tar_fault
from rae_xla.data.shards.tar_samples import HashingReader, parse_label, read_samples, usable_samples
from rae_xla.data.shards.tars import is_tar, tar_files
from rae_xla.data.shards.worker_pool import ordered_map
from rae_xla.errors import UserError


def index_shards(
    source: str,
    out: str | None = None,
    *,
    class_names: tuple[str, ...] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> ShardIndex:
    """Write an index of tar files whose samples are an image and a label in a ``.cls`` member.

    Members that are not used are logged, and so are JPEGs whose EXIF rotation is ignored.

    Args:
        source: a folder of tars, one tar, or a brace pattern within one folder; local or ``gs://``.
        out: folder for the index, if not the folder of the tars.
        class_names: names of the labels; if None, those of an index that the folder of the tars
            has, or their numbers.
        workers: number of processes; each reads one tar at a time, sequentially.
        progress: called with the number of bytes read so far, and their total.

    Raises:
        UserError: there is an index already; or a tar is damaged, or a sample has no image or no
            valid label. All bad tars are named, and nothing is written.
    """
    paths = tar_files(source)
    [folder, *others] = sorted({storage.split(path)[0] for path in paths})
    if others:
        raise UserError(f"{source}: an index covers one folder; index each folder separately")
    target = folder if out is None else str(out)
    present = storage.list_files(folder)
    _check_target(folder, target, present, {storage.split(path)[1] for path in paths})
    total = sum(present[storage.split(path)[1]].size for path in paths)
    done, shards, tables, faults = 0, [], [], []
    left_out, notes = LeftOut(), ImageNotes()
    for scanned in ordered_map(_scan, paths, workers):
        done += scanned.shard.bytes
        if progress is not None:
            progress(done, total)
        fault = scanned.fault or listing_fault(scanned.shard, present)
        if fault:
            faults.append(f"{scanned.shard.file}: {fault}")
        left_out.merge(scanned.left_out)
        notes.merge(scanned.notes)
        shards.append(scanned.shard)
        tables.append(scanned.rows)
    if faults:
        raise UserError(
            f"{folder}: {len(faults)} of {len(shards)} tars cannot be indexed, so nothing is "
            f"written: {'; '.join(faults)}"
        )
    left_out.log(f"{folder}: members of the tars")
    notes.log(folder)
    samples = np.concatenate(tables)
    largest = int(samples["label"].max())
    names = names_for(largest, class_names or _names_in_index(folder, present, largest), folder)
    storage.make_folder(target)
    save_index(target, shards, names, samples, None if target == folder else folder)
    return open_index(target)


def _names_in_index(
    folder: str, present: dict[str, storage.FileInfo], largest: int
) -> tuple[str, ...] | None:
    """Return the class names in the index that tars already have, unless a label has none."""
    if INDEX_FILE not in present:
        return None
    names = read_index(folder).class_names
    return names if largest < len(names) else None


def _check_target(
    folder: str, target: str, present: dict[str, storage.FileInfo], chosen: set[str]
) -> None:
    """Raise if the index would replace another, or cover only some tars of its own folder."""
    same_folder = storage.real_path(folder) == storage.real_path(target)
    if same_folder:
        existing = present
    else:
        existing = storage.list_files(target) if storage.exists(target) else {}
    for name in (INDEX_FILE, TABLE_FILE):
        if name in existing:
            raise UserError(
                f"{storage.join(target, name)} exists already: delete it if it is out of date, or "
                "give another folder with --out"
            )
    rest = sorted(name for name in present if is_tar(name) and name not in chosen)
    if same_folder and rest:
        raise UserError(
            f"{folder}: the folder holds {len(rest)} other tars ({rest[0]}, …): give a separate "
            "folder for this index with --out"
        )


@dataclass(frozen=True, eq=False)
class _ScannedTar:
    """A tar as it was found, up to its first fault, if it has one."""

    shard: Shard
    rows: NDArray[np.void]
    fault: str | None
    left_out: LeftOut
    notes: ImageNotes


def _scan(path: str) -> _ScannedTar:
    rows: list[tuple[int, int, int, int]] = []
    faults: list[str] = []
    left_out, notes = LeftOut(), ImageNotes()
    name = storage.split(path)[1]
    with storage.open_read(path) as raw:
        file = HashingReader(raw)
        try:
            for sample in usable_samples(read_samples(file, left_out), faults):
                image, label = sample.image or b"", parse_label(sample.label or b"")
                rows.append((sample.offset, sample.size, label or 0, zlib.crc32(image)))
                if is_rotated(image):
                    notes.add(ROTATED, f"{name}: {sample.key}")
            file.drain()
        except (DamagedTarError, OSError) as error:
            # First, because the fault of the last sample may be a consequence of the damage.
            faults.insert(0, tar_fault(error, len(rows)))
    if not rows and not faults:
        found = f" ({left_out})" if left_out.counts else ""
        faults.append(f"there is no sample in it{found}")
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    sha256, md5 = file.sha256.hexdigest(), file.md5.hexdigest()
    shard = Shard(name, len(rows), file.position, sha256, md5)
    fault = faults[0] + more if faults else None
    return _ScannedTar(shard, np.array(rows, SAMPLE), fault, left_out, notes)
