"""Statistics of shards: counts, the text, and the plot."""

import io
import os

import numpy as np
import pytest
from foreign_tars import imagenet_members, write_tar
from PIL import Image

from rae_xla.data.shards.encoding import ShardSample
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.stats import HEADER_BYTES, format_stats, save_stats_plot, shard_stats
from rae_xla.data.shards.writer import write_shards
from rae_xla.errors import UserError


def _encoded(width: int, height: int, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path):
    """Sizes 30 x 40, 50 x 20, and a large image of each format; class "c" is empty."""
    samples = [ShardSample(_encoded(30, 40, "JPEG"), "jpg", 0)] * 3
    samples += [ShardSample(_encoded(50, 20, "PNG"), "png", 1)] * 2
    samples += [ShardSample(_encoded(400, 300, "PNG"), "png", 3)]
    samples += [ShardSample(_encoded(400, 300, "WEBP", lossless=True), "webp", 3)]
    samples += [ShardSample(_encoded(400, 300, "TIFF"), "tif", 3)]
    exif = Image.Exif()
    exif[0x010E] = "x" * 65_000
    samples += [ShardSample(_encoded(300, 400, "JPEG", exif=exif), "jpg", 3)]
    return write_shards(
        samples, str(tmp_path / "x"), classes=("a", "b", "c", "d"), samples_per_shard=4
    )


def test_counts_and_resolutions(index):
    stats = shard_stats(index)
    assert stats.per_class.tolist() == [3, 2, 0, 4]
    assert stats.widths.tolist() == [30, 30, 30, 50, 50, 400, 400, 400, 300]
    assert stats.heights.tolist() == [40, 40, 40, 20, 20, 300, 300, 300, 400]
    assert stats.short_sides.tolist() == [30, 30, 30, 20, 20, 300, 300, 300, 300]
    assert stats.formats == {"JPEG": 4, "PNG": 3, "WEBP": 1, "TIFF": 1}
    assert (stats.examined, stats.unreadable) == (9, ())
    assert stats.image_bytes.tolist() == index.samples["size"].tolist()
    assert (stats.image_bytes[5:8] > HEADER_BYTES).all()
    text = format_stats(stats)
    for line in [
        "images            9",
        "classes           4 (3 with images)",
        "images per class  min 0, median 2, max 4 (fewest: c, most: d)",
        "  formats         JPEG 4, PNG 3, WEBP 1, TIFF 1",
        "  width           min 30, median 50, max 400 pixels",
        "  short side      min 20, median 30, max 300 pixels",
    ]:
        assert line in text.splitlines()


def test_evenly_spaced_images_are_examined(index):
    stats = shard_stats(index, sample=3)
    assert stats.widths.tolist() == [30, 50, 400]
    assert stats.per_class.sum() == 9
    assert "of 3 images examined" in format_stats(stats)
    with pytest.raises(UserError, match="--sample is 0"):
        shard_stats(index, sample=0)


def test_unreadable_images_are_counted(tmp_path):
    samples = [ShardSample(b"garbage", "png", 0), ShardSample(_encoded(8, 8, "PNG"), "png", 0)]
    stats = shard_stats(write_shards(samples, str(tmp_path / "x")))
    assert stats.unreadable == (0,)
    assert "unreadable      1 (the first is sample 0)" in format_stats(stats)
    none = shard_stats(write_shards(samples[:1], str(tmp_path / "y")))
    assert "formats         unknown" in format_stats(none)
    with pytest.raises(UserError, match="no image could be read"):
        save_stats_plot(none, str(tmp_path / "y.png"))


def test_a_shard_that_disappeared(index):
    os.remove(index.path_of(index.shards[0]))
    with pytest.raises(UserError, match="the shard has disappeared"):
        shard_stats(index)


@pytest.mark.filterwarnings("error")
def test_the_plot(tmp_path, index):
    save_stats_plot(shard_stats(index), str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as plot:
        assert plot.size == (1800, 600)
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 20
    write_tar(tmp_path / "one" / "a.tar", imagenet_members(0, 1))
    one = shard_stats(index_shards(str(tmp_path / "one")))
    save_stats_plot(one, f"file://{tmp_path}/one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    with pytest.raises(UserError, match=r"--out takes the name of a \.png file"):
        save_stats_plot(one, str(tmp_path / "one.jpg"))
