"""Existing shards as a source of shards."""

import os
import shutil

import numpy as np
import pytest
from foreign_tars import imagenet_members, jpeg, write_imagenet, write_tar
from PIL import Image

from rae_xla.data.reader import load_sample, read_image
from rae_xla.data.shards.encoding import Encoding
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.sources import open_image_source
from rae_xla.data.shards.tars import expand_braces, tar_files
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import make_shards
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


def _open(source, **options):
    return open_image_source(str(source), shuffle=False, **options)


def _samples(source) -> list[tuple[bytes, str, int]]:
    return [(sample.image, sample.extension, sample.label) for sample in source]


EXPECTED = [(jpeg(number), "jpg", number % 3) for number in range(21)]


def test_every_way_to_specify_tars(tmp_path):
    pattern = write_imagenet(tmp_path / "x")
    for source in (tmp_path / "x", pattern, f"file://{tmp_path}/x", f"file://{pattern}"):
        opened = _open(source)
        assert len(opened) == 21
        assert _samples(opened) == EXPECTED
        assert opened.classes == ("0", "1", "2")
    assert _samples(_open(tmp_path / "x" / "imagenet1k-train-0001.tar")) == EXPECTED[7:14]


def test_an_index_is_used_where_there_is_one(tmp_path, make_shards):
    pattern = write_imagenet(tmp_path / "x")
    scanned = _open(pattern)
    index_shards(str(tmp_path / "x"), class_names=("a", "b", "c"))
    for source in (_open(tmp_path / "x"), _open(tmp_path / "x" / "index.json")):
        assert source.classes == ("a", "b", "c")
        assert _samples(source) == EXPECTED
        assert source.contents == scanned.contents
    own = make_shards(40)
    assert _samples(_open(own.folder)) == [
        (read_image(own, number), "png", number % 5) for number in range(40)
    ]


def test_workers_and_order(tmp_path):
    pattern = write_imagenet(tmp_path / "x")
    assert _samples(_open(pattern, workers=2)) == EXPECTED
    mixed = open_image_source(pattern)
    assert _samples(mixed) != EXPECTED
    assert sorted(_samples(mixed)) == sorted(EXPECTED)
    assert _samples(mixed) == _samples(open_image_source(pattern, workers=2))


def test_resharded_and_resized(tmp_path):
    write_imagenet(tmp_path / "x")
    source = _open(tmp_path / "x", encoding=Encoding(10), class_names=("a", "b", "c", "d"))
    index = make_shards(source, str(tmp_path / "out"), samples_per_shard=4)
    assert [shard.samples for shard in index.shards] == [4, 4, 4, 4, 4, 1]
    assert index.class_names == ("a", "b", "c", "d")
    assert verify(index.folder) == []
    original = index_shards(str(tmp_path / "x"))
    for number in range(21):
        np.testing.assert_array_equal(
            load_sample(index, number, CenterCrop(10), (0, 0)),
            load_sample(original, number, CenterCrop(10), (0, 0)),
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_a_bad_sample_and_its_tar(tmp_path, workers):
    write_imagenet(tmp_path / "x")
    good = imagenet_members(0, 2)
    path = tmp_path / "x" / "imagenet1k-train-0001.tar"
    for bad, message in [
        ([("n1/b.jpg", jpeg(0))], r"0001\.tar: sample n1/b: the label is missing"),
        ([("b.cls", b"0")], r"0001\.tar: sample b: the image is missing"),
        ([("b.cls", b"x"), ("b.jpg", jpeg(0))], "sample b: the label b'x' is not a number"),
        (good[:3], "sample n00000000_0: the key appears a second time"),
    ]:
        write_tar(path, [*good, *bad])
        with pytest.raises(UserError, match=message):
            _open(tmp_path / "x", workers=workers)
    write_tar(path, [("b.cls", b"0"), ("b.jpg", b"garbage")])
    with pytest.raises(UserError, match=r"0001\.tar: b\.jpg: not a readable image"):
        list(_open(tmp_path / "x", workers=workers))


def test_damaged_and_missing_tars(tmp_path):
    pattern = write_imagenet(tmp_path / "x")
    path = tmp_path / "x" / "imagenet1k-train-0002.tar"
    source = _open(pattern)
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=r"0002\.tar: not a complete tar after \d samples"):
        _open(pattern)
    with pytest.raises(UserError, match=r"0002\.tar: the tar became shorter"):
        list(source)
    path.unlink()
    with pytest.raises(UserError, match=r"0002\.tar: no such file"):
        _open(pattern)
    with pytest.raises(UserError, match=r"0002\.tar: the tar has disappeared"):
        list(source)
    with pytest.raises(UserError, match="only 2 classes have names"):
        _open(tmp_path / "x", class_names=("a", "b"))
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(UserError, match="no such folder"):
        _open(f"file://{tmp_path}/x")


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_do_not_match_the_index(tmp_path, workers):
    """A changed image that still decodes must not get a new checksum."""
    write_imagenet(tmp_path / "x")
    index = index_shards(str(tmp_path / "x"))
    other = jpeg(15, 24, 20).replace(b"JFIF", b"JFIX")
    assert len(other) == index.samples["size"][15]
    path = tmp_path / "x" / "imagenet1k-train-0002.tar"
    with open(path, "r+b") as file:
        file.seek(index.samples["offset"][15])
        file.write(other)
    for source in (tmp_path / "x", tmp_path / "x" / "index.json"):
        with pytest.raises(UserError, match=r"0002\.tar: n0+_15\.jpg: not the image that"):
            make_shards(_open(source, workers=workers), str(tmp_path / "out"))
    unindexed = _samples(_open(path))  # without an index this cannot be detected
    assert unindexed[1] == (other, "jpg", 15 % 3)


def test_braces(tmp_path):
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("a-{08..10}-{x,y}") == [
        f"a-{number}-{letter}" for number in ("08", "09", "10") for letter in "xy"
    ]
    assert len(expand_braces("imagenet1k-train-{0000..1023}.tar")) == 1024
    for wrong in ("{5..3}.tar", "{abc}.tar", "{}.tar"):
        with pytest.raises(UserError, match="is neither a range such as"):
            expand_braces(wrong)
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"there is no \.tar file in this folder"):
        tar_files(str(tmp_path))
