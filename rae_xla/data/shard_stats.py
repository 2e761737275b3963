"""What is in a folder of shards, in numbers: classes, bytes, formats and resolutions.

Only the headers of images are read, by range, so a few thousand of a large data set take seconds.
"""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.data import storage
from rae_xla.data.index import ShardIndex
from rae_xla.data.reader import DECODE_ERRORS
from rae_xla.errors import UserError

LOOKED_AT = 10_000
"""Images whose headers are read unless told otherwise."""

HEADER_BYTES = 64 << 10
"""Read of an image first: a JPEG's size stands behind its EXIF block, of at most 64 KiB."""

READERS = 16
"""Threads: reading headers from a bucket is waiting for answers."""


@dataclass(frozen=True, eq=False)
class ShardStats:
    """Counts of all samples; formats and sizes in pixels of those that were looked at.

    ``per_class`` (classes,) counts samples, ``image_bytes`` (samples,) their encoded bytes;
    ``widths`` and ``heights`` (looked at,) are pixels; ``unreadable`` names samples by number.
    """

    folder: str
    class_names: tuple[str, ...]
    shard_bytes: NDArray[np.int64]
    per_class: NDArray[np.int64]
    image_bytes: NDArray[np.int64]
    formats: dict[str, int]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    unreadable: tuple[int, ...]

    @property
    def looked_at(self) -> int:
        """How many images the formats and resolutions are of."""
        return len(self.widths) + len(self.unreadable)

    @property
    def short_sides(self) -> NDArray[np.int64]:
        """Pixels of the shorter side of the images looked at."""
        return np.minimum(self.widths, self.heights)


def shard_stats(index: ShardIndex, sample: int = LOOKED_AT) -> ShardStats:
    """Count what the index knows, and look at ``sample`` images spread evenly over the shards.

    Raises:
        UserError: if ``sample`` is below 1, or a shard has disappeared.
    """
    if sample < 1:
        raise UserError(f"--sample is {sample}; it must be at least 1")
    count = min(sample, len(index))
    chosen = [i * len(index) // count for i in range(count)]
    with ThreadPoolExecutor(READERS) as threads:
        found = list(threads.map(lambda number: _header(index, number), chosen))
    headers = [header for header in found if header is not None]
    return ShardStats(
        folder=index.folder,
        class_names=index.class_names,
        shard_bytes=np.array([shard.bytes for shard in index.shards], np.int64),
        per_class=np.bincount(index.samples["label"], minlength=index.num_classes),
        image_bytes=index.samples["size"].astype(np.int64),
        formats=dict(Counter(name for name, _, _ in headers).most_common()),
        widths=np.array([width for _, width, _ in headers], np.int64),
        heights=np.array([height for _, _, height in headers], np.int64),
        unreadable=tuple(n for n, header in zip(chosen, found, strict=True) if header is None),
    )


def report(stats: ShardStats) -> str:
    """The statistics as lines for people."""
    total, classes = len(stats.image_bytes), len(stats.per_class)
    fewest, most = (int(f(stats.per_class)) for f in (np.argmin, np.argmax))
    per_class = f"{stats.per_class[most]:,} of each"
    if stats.per_class[fewest] < stats.per_class[most]:
        names = stats.class_names
        per_class = f"{_spread(stats.per_class)} (fewest: {names[fewest]}, most: {names[most]})"
    lines = [
        f"{stats.folder}",
        f"images            {total:,}",
        f"classes           {classes:,} ({np.count_nonzero(stats.per_class):,} with images)",
        f"shards            {len(stats.shard_bytes):,}, {stats.shard_bytes.sum() / 1e6:,.1f} MB",
        f"images per class  {per_class}",
        f"kB per image      {_spread(stats.image_bytes / 1e3, 1)}",
        f"MB per shard      {_spread(stats.shard_bytes / 1e6, 1)}",
        f"of {stats.looked_at:,} images looked at",
    ]
    formats = ", ".join(f"{name} {count:,}" for name, count in stats.formats.items())
    lines.append(f"  formats         {formats or 'none could be told'}")
    if len(stats.widths):
        lines += [
            f"  width           {_spread(stats.widths)} pixels",
            f"  height          {_spread(stats.heights)} pixels",
            f"  short side      {_spread(stats.short_sides)} pixels",
        ]
    if stats.unreadable:
        lines.append(
            f"  unreadable      {len(stats.unreadable):,} (the first is sample "
            f"{stats.unreadable[0]}): run `rae-xla shards verify {stats.folder}`"
        )
    return "\n".join(lines)


def _spread(values: NDArray[np.int64] | NDArray[np.float64], digits: int = 0) -> str:
    low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
    return f"min {low:,.{digits}f}, median {middle:,.{digits}f}, max {high:,.{digits}f}"


def _header(index: ShardIndex, sample: int) -> tuple[str, int, int] | None:
    """Format, width and height; None if these bytes are no image."""
    row = index.samples[sample]
    offset, size = int(row["offset"]), int(row["size"])
    path = index.path_of(index.shard_of(sample))
    # Some formats keep what is asked for at their end: then the whole image is read.
    for length in (HEADER_BYTES, size) if size > HEADER_BYTES else (size,):
        try:
            content = storage.read_range(path, offset, length)
        except FileNotFoundError:
            raise UserError(f"{path}: the shard has disappeared; put it back") from None
        try:
            with Image.open(io.BytesIO(content)) as image:
                return image.format or "unknown", image.width, image.height
        except DECODE_ERRORS:
            continue
    return None
