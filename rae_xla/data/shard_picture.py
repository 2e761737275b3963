"""A picture of what is in a folder of shards: resolutions, and samples per class."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla.data import storage
from rae_xla.data.shard_stats import ShardStats
from rae_xla.errors import UserError

Pixels = NDArray[np.int64]


def save_picture(stats: ShardStats, path: str) -> None:
    """Write a PNG with histograms of the short side, of width and height, and of class sizes.

    Raises:
        UserError: if ``path`` does not end in ``.png`` or no image could be read.
    """
    if not path.lower().endswith(".png"):
        raise UserError(f"{path}: --out takes the name of a .png file")
    if not len(stats.widths):
        raise UserError(f"{stats.folder}: no image could be read, so there is nothing to draw")
    # A figure of its own, not pyplot's: no display, and nothing of the caller's is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{len(stats.image_bytes):,} images of {len(stats.per_class):,} classes "
        f"({len(stats.widths):,} looked at)"
    )
    short, resolution, classes = figure.subplots(1, 3)

    sides, note = _without_giants(stats.short_sides)
    short.hist(sides, bins=_bins(sides), color="tab:blue")
    median = float(np.median(stats.short_sides))
    short.axvline(median, color="black", linestyle="--", label=f"median {median:,.0f}")
    short.set(title="Shorter side", xlabel=f"pixels{note}", ylabel="images")
    short.legend()

    widths, wide = _without_giants(stats.widths)
    heights, high = _without_giants(stats.heights)
    counts, across, down = np.histogram2d(widths, heights, (_bins(widths, 40), _bins(heights, 40)))
    shades = LogNorm(vmin=1, vmax=max(10, int(np.max(counts))))  # a scale even for one image
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


def _without_giants(values: Pixels) -> tuple[Pixels, str]:
    """Rare giants, which would squeeze all the rest into one bin, counted as the largest shown.

    Also what is to be said of that in the label of the axis.
    """
    most = int(np.percentile(values, 99.5))
    if int(np.max(values)) <= 1.5 * most:
        return values, ""
    return np.minimum(values, most), f"; last: {most:,} and more"


def _bins(values: Pixels, most: int = 60) -> NDArray[np.floating[Any]]:
    """Edges of at most ``most`` bins, a whole number of units wide, around whole numbers."""
    low, high = int(np.min(values)), int(np.max(values))
    step = max(1, -(-(high - low + 1) // most))
    return np.arange(low, high + step + 1, step) - 0.5
