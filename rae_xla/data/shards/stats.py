"""Statistics of a folder of shards: classes, sizes, formats and resolutions; as text and plot.

Only the headers of images are read, by range, so thousands of them take seconds.
"""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.image_decoding import ImageError, open_image
from rae_xla.data.shards.index import ShardIndex
from rae_xla.errors import UserError

DEFAULT_EXAMINED = 10_000
"""Default number of images whose headers are read."""

HEADER_BYTES = 64 << 10
"""Bytes of an image that are read first: a JPEG's size follows its EXIF block of up to 64 KiB."""

READERS = 16
"""Number of threads, which mostly wait for the bucket."""

MAX_BINS = 60
"""Bins of a histogram."""


@dataclass(frozen=True, eq=False)
class ShardStats:
    """Statistics of all samples, and of the images that were examined.

    Attributes:
        folder: of the shards.
        class_names: by label.
        shard_bytes: size of every shard.
        per_class: number of samples of every class.
        image_bytes: encoded size of every image.
        formats: number of examined images by format.
        widths: of the examined images, in pixels.
        heights: of the examined images, in pixels.
        unreadable: numbers of the examined samples whose image is not readable.
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
    def examined(self) -> int:
        """Number of examined images."""
        return len(self.widths) + len(self.unreadable)

    @property
    def short_sides(self) -> NDArray[np.int64]:
        """Shorter side of the examined images, in pixels."""
        return np.minimum(self.widths, self.heights)


def shard_stats(index: ShardIndex, sample: int = DEFAULT_EXAMINED) -> ShardStats:
    """Compute statistics from the index, and examine evenly spaced images.

    Args:
        index: of the shards.
        sample: number of images to examine.

    Raises:
        UserError: ``sample`` is below 1, there is no image, or a shard has disappeared.
    """
    if sample < 1:
        raise UserError(f"--sample is {sample}; it must be at least 1")
    if not len(index):
        raise UserError(f"{index.folder}: the index has texts, but no image to show statistics of")
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


def format_stats(stats: ShardStats) -> str:
    """Return the statistics as text."""
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
        f"of {stats.examined:,} images examined",
    ]
    formats = ", ".join(f"{name} {count:,}" for name, count in stats.formats.items())
    lines.append(f"  formats         {formats or 'unknown'}")
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
    """Return format, width and height of an image; None if it is not readable."""
    row = index.samples[sample]
    offset, size = int(row["offset"]), int(row["size"])
    path = index.path_of(index.shard_of(sample))
    # Some formats have this information at their end: then the rest is read, too.
    for length in (HEADER_BYTES, size) if size > HEADER_BYTES else (size,):
        try:
            content = storage.read_range(path, offset, length)
        except FileNotFoundError:
            raise UserError(f"{path}: the shard has disappeared; put it back") from None
        try:
            with open_image(content) as image:
                return image.format or "unknown", image.width, image.height
        except ImageError:
            continue
    return None


def save_stats_plot(stats: ShardStats, path: str) -> None:
    """Write a PNG with histograms of the shorter side, the resolution and the class sizes.

    Raises:
        UserError: ``path`` does not end in ``.png``, or no image could be read.
    """
    if not path.lower().endswith(".png"):
        raise UserError(f"{path}: --out takes the name of a .png file")
    if not len(stats.widths):
        raise UserError(f"{stats.folder}: no image could be read, so there is nothing to plot")
    # Without pyplot, which would need a display and change the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{len(stats.image_bytes):,} images of {len(stats.per_class):,} classes "
        f"({len(stats.widths):,} examined)"
    )
    short, resolution, classes = figure.subplots(1, 3)

    sides, note = _clip_outliers(stats.short_sides)
    short.hist(sides, bins=_bins(sides), color="tab:blue")
    median = float(np.median(stats.short_sides))
    short.axvline(median, color="black", linestyle="--", label=f"median {median:,.0f}")
    short.set(title="Shorter side", xlabel=f"pixels{note}", ylabel="images")
    short.legend()

    widths, wide = _clip_outliers(stats.widths)
    heights, high = _clip_outliers(stats.heights)
    counts, across, down = np.histogram2d(widths, heights, (_bins(widths, 40), _bins(heights, 40)))
    shades = LogNorm(vmin=1, vmax=max(10, int(np.max(counts))))  # a scale also for one image
    cells = resolution.pcolormesh(across, down, np.ma.masked_equal(counts.T, 0), norm=shades)
    figure.colorbar(cells, ax=resolution, label="images")
    resolution.set(
        title="Resolution", xlabel=f"width (pixels{wide})", ylabel=f"height (pixels{high})"
    )

    classes.hist(stats.per_class, bins=_bins(stats.per_class), color="tab:green")
    classes.set(title="Class sizes", xlabel="images of a class", ylabel="classes")

    for axis in (short.yaxis, classes.yaxis, classes.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    storage.write_bytes(path, buffer.getvalue())


def _clip_outliers(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Clip rare large values, which would squeeze all others into one bin.

    Returns:
        The values, and a note for the label of the axis.
    """
    limit = int(np.percentile(values, 99.5))
    if int(np.max(values)) <= 1.5 * limit:
        return values, ""
    return np.minimum(values, limit), f"; last: {limit:,} and more"


def _bins(values: NDArray[np.int64], most: int = MAX_BINS) -> NDArray[np.floating[Any]]:
    """Return the edges of at most ``most`` bins of integer width, centred on integers."""
    low, high = int(np.min(values)), int(np.max(values))
    step = max(1, -(-(high - low + 1) // most))
    return np.arange(low, high + step + 1, step) - 0.5
