"""What a folder of shards holds: ``index.json`` for people, ``samples.npy`` for the reader.

The index pins every shard by size and SHA-256 and every sample by the byte range of its image, its
label and a CRC-32, so that a sample is one range read away and anything that changed is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla.data import storage
from rae_xla.errors import UserError

INDEX_FILE = "index.json"
TABLE_FILE = "samples.npy"
FORMAT = "rae-xla shards"
VERSION = 2
READABLE_VERSIONS = (1, 2)

SAMPLE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("crc32", "<u4")])
"""One row a sample: where its image's bytes start in its shard and how many, label, checksum."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, samples, bytes, SHA-256 and MD5 (hexadecimal).

    Buckets list the MD5 of what they hold: it tells a changed shard without reading it.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    md5: str | None = None


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A folder of shards; ``len`` is the number of samples, numbered in the order of the shards.

    ``generations`` (by file, from the listing when the index was opened) pins what is read from a
    bucket to the objects that were there then.
    """

    folder: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    samples: NDArray[np.void]
    generations: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_classes(self) -> int:
        """How many classes there are names for; every label is below it."""
        return len(self.class_names)

    @property
    def max_label(self) -> int:
        """The largest label any sample has."""
        return int(self.samples["label"].max())

    @property
    def num_bytes(self) -> int:
        """Bytes of all images together."""
        return int(self.samples["size"].sum())

    @cached_property
    def fingerprint(self) -> str:
        """A hash (hexadecimal) of all content and its order: equal wherever the folder lies."""
        described = {
            "shards": [[shard.samples, shard.bytes, shard.sha256] for shard in self.shards],
            "samples": hashlib.sha256(self.samples.tobytes()).hexdigest(),
            "classes": self.class_names,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The number of samples up to the end of each shard."""
        return np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)

    def shard_of(self, sample: int) -> Shard:
        """The shard in which the sample with this number lies."""
        return self.shards[int(np.searchsorted(self.ends, sample, side="right"))]

    def path_of(self, shard: Shard) -> str:
        """The full path of a shard."""
        return storage.join(self.folder, shard.file)

    def check_labels(self, num_classes: int) -> None:
        """Make sure that a model of so many classes can take every label.

        Raises:
            UserError: if a label is out of its range.
        """
        if self.max_label >= num_classes:
            sample = int(np.argmax(self.samples["label"]))
            raise UserError(
                f"{self.folder}: label {self.max_label} (sample {sample}, in "
                f"{self.shard_of(sample).file}) is out of range for a model of {num_classes} "
                f"classes (labels 0 to {num_classes - 1}): set num_classes to {self.num_classes}, "
                "or train on other shards"
            )


def save_index(
    folder: str,
    shards: Sequence[Shard],
    class_names: Sequence[str],
    samples: NDArray[np.void],
    shards_folder: str | None = None,
) -> None:
    """Write the table, then ``index.json``: a folder with an ``index.json`` is complete.

    ``shards_folder`` is where the shards lie, if not in ``folder`` beside their index.
    """
    buffer = io.BytesIO()
    np.save(buffer, samples)
    table = buffer.getvalue()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **({"folder": shards_folder} if shards_folder is not None else {}),
        "samples": len(samples),
        "bytes": sum(shard.bytes for shard in shards),
        "labels": {"min": int(samples["label"].min()), "max": int(samples["label"].max())},
        "table": {"file": TABLE_FILE, "sha256": hashlib.sha256(table).hexdigest()},
        "classes": list(class_names),
        "shards": [vars(shard) for shard in shards],
    }
    storage.write_bytes(storage.join(folder, TABLE_FILE), table)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, INDEX_FILE), text.encode())


def open_index(path: str, num_classes: int | None = None) -> ShardIndex:
    """Open a folder of shards (or its ``index.json``) and check it as far as a listing tells.

    Args:
        path: local or ``gs://``.
        num_classes: if given, every label must be below it.

    Raises:
        UserError: if the index is missing or damaged, if a shard is missing, has another size than
            the index says or was overwritten, or if a label is out of range.
    """
    index = read_index(path)
    try:
        present = storage.list_files(index.folder)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: the index is of shards in {index.folder}, and there is no such folder; put "
            "them back, or index them where they are (`rae-xla shards index`)"
        ) from None
    wrong = [fault for shard in index.shards if (fault := listing_fault(shard, present))]
    wrong = wrong or _overwritten(index, present)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(
            f"{index.folder}: the index does not match its shards: {'; '.join(wrong[:3])}{more}. "
            f"Run `rae-xla shards verify {index.folder}`, then copy or make the shards again"
        )
    if num_classes is not None:
        index.check_labels(num_classes)
    pinned = {s.file: g for s in index.shards if (g := present[s.file].generation) is not None}
    return replace(index, generations=pinned)


def _overwritten(index: ShardIndex, present: Mapping[str, storage.FileInfo]) -> list[str]:
    """Shards of the right size whose last image is another than the one that was indexed.

    Only where a listing does not tell: on a disk, and of a bucket's objects without an MD5.
    """

    def fault(shard: Shard, end: int) -> str | None:
        if present[shard.file].md5 is not None and shard.md5 is not None:
            return None
        row = index.samples[end - 1]
        content = storage.read_range(index.path_of(shard), int(row["offset"]), int(row["size"]))
        if zlib.crc32(content) == int(row["crc32"]):
            return None
        return f"{shard.file} was overwritten: its last image is not the one that was indexed"

    with ThreadPoolExecutor(32) as pool:
        faults = pool.map(fault, index.shards, index.ends.tolist())
        return [text for text in faults if text is not None]


def listing_fault(shard: Shard, present: Mapping[str, storage.FileInfo]) -> str | None:
    """What a listing of the folder shows to be wrong with a shard, if anything."""
    if shard.file not in present:
        return f"{shard.file} is missing"
    found, md5 = present[shard.file].size, present[shard.file].md5
    if found == shard.bytes:
        if md5 is not None and shard.md5 is not None and md5 != shard.md5:
            return f"{shard.file} was overwritten: its MD5 is {md5}, the index says {shard.md5}"
        return None
    what = "empty" if found == 0 else "truncated" if found < shard.bytes else "too long"
    return f"{shard.file} is {what}: {found} bytes, the index says {shard.bytes}"


def read_index(path: str) -> ShardIndex:
    """Read an index and check it against itself, without a look at the shards.

    Raises:
        UserError: if a file of the index is missing, damaged or not one of ours.
    """
    path = str(path)
    folder = storage.split(path)[0] if path.endswith(".json") else path.rstrip("/") or "/"
    file = path if path.endswith(".json") else storage.join(folder, INDEX_FILE)
    try:
        text = storage.read_bytes(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_index(folder, file)) from None
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT:
            raise UserError(f"{file}: the format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] not in READABLE_VERSIONS:
            raise UserError(
                f"{file}: version {manifest['version']} of the index; this rae_xla reads versions "
                f"up to {VERSION}: make the shards again"
            )
        shards = tuple(Shard(**shard) for shard in manifest["shards"])
        class_names = tuple(str(name) for name in manifest["classes"])
        samples = _read_table(storage.join(folder, manifest["table"]["file"]), manifest)
        promised = sum(operator.index(shard.samples) for shard in shards)
        sizes = [operator.index(shard.bytes) for shard in shards]
        counted = operator.index(manifest["samples"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a readable index ({type(error).__name__}: {error}); make the shards again"
        ) from None
    if not len(samples) or not len(samples) == promised == counted or min(sizes) < 0:
        raise UserError(
            f"{file}: the shards hold {promised} samples by the index, {counted} in all, its table "
            f"lists {len(samples)}; make the shards again"
        )
    labels = samples["label"]
    bad = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(bad):
        raise UserError(
            f"{file}: label {labels[bad[0]]} of sample {bad[0]} is out of range: the index names "
            f"{len(class_names)} classes; make the shards again with right labels"
        )
    return ShardIndex(manifest.get("folder", folder), shards, class_names, samples)


def _read_table(path: str, manifest: dict[str, Any]) -> NDArray[np.void]:
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it belongs to {INDEX_FILE}; copy it there") from None
    if hashlib.sha256(content).hexdigest() != manifest["table"]["sha256"]:
        raise UserError(
            f"{path} is not the table that {INDEX_FILE} was written with (its checksum differs): "
            "copy the whole folder again, or make the shards again"
        )
    table: NDArray[np.void] = np.load(io.BytesIO(content), allow_pickle=False)
    if table.dtype != SAMPLE:
        raise UserError(f"{path}: unexpected columns {table.dtype}; make the shards again")
    return table


def _no_index(folder: str, file: str) -> str:
    if not storage.exists(folder):
        return f"{folder}: no such folder; shards are made with `rae-xla shards make SOURCE OUT`"
    return (
        f"{file}: no such file, so {folder} is not a (finished) folder of shards; make one with "
        "`rae-xla shards make SOURCE OUT`"
    )
