"""The index of a folder of shards: ``index.json``, and the sample table ``samples.npy``.

The index has the size and SHA-256 of every shard, and the byte range of the image, the label and a
CRC-32 of every sample. So a sample takes one range read, and changed data are detected.
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

from rae_xla import storage
from rae_xla.errors import UserError

INDEX_FILE = "index.json"
TABLE_FILE = "samples.npy"
WRITING_FILE = ".writing"
"""Marks a folder whose shards are being written; see ``journal``."""

FORMAT = "rae-xla shards"
VERSION = 2
READABLE_VERSIONS = (1, 2)

SAMPLE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("crc32", "<u4")])
"""A row per sample: offset and size of its image in its shard, label, CRC-32 of the image."""


@dataclass(frozen=True)
class Shard:
    """One tar file of an index.

    Attributes:
        file: name in the folder.
        samples: number of samples.
        bytes: size of the file.
        sha256: of the file (hexadecimal).
        md5: of the file (hexadecimal). Buckets list it, so a changed shard is found without
            reading it.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    md5: str | None = None


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A folder of shards; ``len`` is the number of samples.

    Attributes:
        folder: holds the shards.
        shards: in order; samples are numbered through all of them.
        class_names: by label.
        samples: table with a row (``SAMPLE``) per sample.
        generations: by file, from the listing when the index was opened; reads from a bucket are
            pinned to these versions.
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
        """Number of classes; every label is below it."""
        return len(self.class_names)

    @property
    def max_label(self) -> int:
        """Largest label of any sample."""
        return int(self.samples["label"].max())

    @property
    def num_bytes(self) -> int:
        """Total bytes of all images."""
        return int(self.samples["size"].sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash (hexadecimal) of all content and its order, independent of the folder's location."""
        content = {
            "shards": [[shard.samples, shard.bytes, shard.sha256] for shard in self.shards],
            "samples": hashlib.sha256(self.samples.tobytes()).hexdigest(),
            "classes": self.class_names,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Number of samples up to the end of each shard."""
        return np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)

    def shard_of(self, sample: int) -> Shard:
        """Return the shard that holds a sample."""
        return self.shards[int(np.searchsorted(self.ends, sample, side="right"))]

    def path_of(self, shard: Shard) -> str:
        """Return the full path of a shard."""
        return storage.join(self.folder, shard.file)

    def check_labels(self, num_classes: int) -> None:
        """Raise if a model with ``num_classes`` classes cannot be trained on the labels.

        Raises:
            UserError: a label is out of range.
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

    Args:
        folder: of the index.
        shards: in order.
        class_names: by label.
        samples: the table (``SAMPLE``) of all samples, in the order of the shards.
        shards_folder: of the shards, if not ``folder``.
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
        **({"images": False} if not len(samples) else {"labels": _label_range(samples)}),
        "table": {"file": TABLE_FILE, "sha256": hashlib.sha256(table).hexdigest()},
        "classes": list(class_names),
        "shards": [vars(shard) for shard in shards],
    }
    storage.write_bytes(storage.join(folder, TABLE_FILE), table)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, INDEX_FILE), text.encode())


def _label_range(samples: NDArray[np.void]) -> dict[str, int]:
    return {"min": int(samples["label"].min()), "max": int(samples["label"].max())}


def open_index(path: str, num_classes: int | None = None) -> ShardIndex:
    """Open a folder of shards, and check the shards against a listing of the folder.

    Args:
        path: the folder or its ``index.json``, local or ``gs://``.
        num_classes: if given, every label must be below it.

    Raises:
        UserError: the index is missing or damaged, a shard is missing, has another size than
            indexed or was overwritten, or a label is out of range.
    """
    index = read_index(path)
    try:
        present = list_shards(index)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: the index describes shards in {index.folder}, which does not exist; restore "
            "the folder, or index the shards where they are (`rae-xla shards index`)"
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
    """Return faults of shards that have the right size, but another last image than indexed.

    Reads only shards whose MD5 the listing does not have: on a disk, and composite objects.
    """

    def fault(shard: Shard, end: int) -> str | None:
        if not shard.file.lower().endswith(".tar"):
            return None  # a single image: reading it checks all of it
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


def list_shards(index: ShardIndex) -> dict[str, storage.FileInfo]:
    """Return the files of the folder of the shards, and of those sub-folders that have shards.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    present = dict(storage.list_files(index.folder))
    folders = {shard.file.rpartition("/")[0] for shard in index.shards} - {""}
    for name in sorted(folders):
        folder = storage.join(index.folder, name)
        if storage.is_folder(folder):
            present |= {f"{name}/{file}": x for file, x in storage.list_files(folder).items()}
    return present


def listing_fault(shard: Shard, present: Mapping[str, storage.FileInfo]) -> str | None:
    """Return what is wrong with a shard according to a listing of its folder, or None."""
    if shard.file not in present:
        return f"{shard.file} is missing"
    found, md5 = present[shard.file].size, present[shard.file].md5
    if found == shard.bytes:
        if md5 is not None and shard.md5 is not None and md5 != shard.md5:
            return f"{shard.file} was overwritten: its MD5 is {md5}, the index lists {shard.md5}"
        return None
    what = "empty" if found == 0 else "truncated" if found < shard.bytes else "too long"
    return f"{shard.file} is {what}: {found} bytes, the index lists {shard.bytes}"


def read_index(path: str) -> ShardIndex:
    """Read an index and check its consistency, without looking at the shards.

    Args:
        path: the folder or its ``index.json``, local or ``gs://``.

    Raises:
        UserError: a file of the index is missing, damaged or has another format.
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
            raise UserError(
                f"{file}: the format is {manifest['format']!r}, not {FORMAT!r}: make the "
                "shards again"
            )
        if manifest["version"] not in READABLE_VERSIONS:
            raise UserError(
                f"{file}: version {manifest['version']} of the index; this rae_xla reads versions "
                f"up to {VERSION}: make the shards again"
            )
        shards = tuple(Shard(**shard) for shard in manifest["shards"])
        class_names = tuple(str(name) for name in manifest["classes"])
        samples = _read_table(storage.join(folder, manifest["table"]["file"]), manifest)
        in_shards = sum(operator.index(shard.samples) for shard in shards)
        sizes = [operator.index(shard.bytes) for shard in shards]
        in_total = operator.index(manifest["samples"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a readable index ({type(error).__name__}: {error}); make the shards again"
        ) from None
    wanted = manifest.get("images", True)  # without images: an index of texts alone
    consistent = len(samples) == in_shards == in_total and bool(len(samples)) == wanted
    if not consistent or min(sizes, default=0) < 0:
        raise UserError(
            f"{file}: the numbers of samples differ: {in_shards} in the shards, {in_total} in "
            f"total, {len(samples)} in the table; make the shards again"
        )
    labels = samples["label"]
    invalid = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(invalid):
        raise UserError(
            f"{file}: label {labels[invalid[0]]} of sample {invalid[0]} is out of range: the index "
            f"names {len(class_names)} classes; make the shards again with correct labels"
        )
    return ShardIndex(manifest.get("folder", folder), shards, class_names, samples)


def _read_table(path: str, manifest: dict[str, Any]) -> NDArray[np.void]:
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it from where {INDEX_FILE} came from") from None
    if hashlib.sha256(content).hexdigest() != manifest["table"]["sha256"]:
        raise UserError(
            f"{path} is not the table that {INDEX_FILE} was written with (its checksum differs): "
            "copy the complete folder again, or make the shards again"
        )
    table: NDArray[np.void] = np.load(io.BytesIO(content), allow_pickle=False)
    if table.dtype != SAMPLE:
        raise UserError(f"{path}: unexpected columns {table.dtype}; make the shards again")
    return table


def _no_index(folder: str, file: str) -> str:
    if not storage.exists(folder):
        return f"{folder}: no such folder; make shards with `rae-xla shards make SOURCE OUT`"
    return (
        f"{file}: no such file, so {folder} is not a (finished) folder of shards; make one with "
        "`rae-xla shards make SOURCE OUT`"
    )
