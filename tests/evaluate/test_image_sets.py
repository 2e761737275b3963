"""Image sets in every layout, read by several processes, and their errors."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.errors import UserError
from rae_xla.evaluate.image_sets import ShardImageSet, open_images
from rae_xla.evaluate.npz_images import NpzImages

SIDE, COUNT = 12, 21


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


def png(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="png")
    return content.getvalue()


def as_npz(folder, images):
    np.savez_compressed(folder / "samples.npz", arr_0=images, labels=np.zeros(len(images)))
    return folder / "samples.npz"


def as_files(folder, images, name="{0:06d}.png"):
    for number, image in enumerate(images):
        path = folder / name.format(number, number // 10)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(image))
    return folder


def as_sample_set(folder, images):
    (folder / "settings.json").write_text(json.dumps({"count": len(images)}))
    (folder / "grid.png").write_bytes(png(images[0]))
    return as_files(folder, images)


def as_tars(folder, images):
    for first in range(0, len(images), 8):
        with tarfile.open(folder / f"samples-{first:06d}.tar", "w") as tar:
            for number in range(first, min(first + 8, len(images))):
                member = tarfile.TarInfo(f"{number:06d}.png")
                content = png(images[number])
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


LAYOUTS = {
    "npz": as_npz,
    "flat": as_files,
    "nested": lambda folder, images: as_files(folder, images, "{1}/{0}.png"),
    "by name": lambda folder, images: as_files(folder, images, "class-{1}/image-{0:03d}.png"),
    "a sample set": as_sample_set,
    "tars": as_tars,
}


def read(image_set, rows, processes):
    """Return all images, assembled from each process's share of each chunk."""
    share = rows // processes
    slices = [slice(i * share, (i + 1) * share) for i in range(processes)]
    own = [list(image_set.chunks(rows, each)) for each in slices]
    assert {len(chunks) for chunks in own} == {-(-image_set.count // rows)}
    assert all(len(part) <= share for chunks in own for part in chunks)
    parts = [part for chunk in zip(*own, strict=True) for part in chunk]
    return np.concatenate(parts).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout, images, tmp_path):
    image_set = open_images(LAYOUTS[layout](tmp_path, images))
    assert (image_set.count, image_set.side) == (COUNT, SIDE)
    for rows, processes in [(8, 1), (8, 2), (32, 4)]:
        assert np.array_equal(read(image_set, rows, processes), images)
    some = open_images(tmp_path if layout != "npz" else tmp_path / "samples.npz", 10)
    assert np.array_equal(read(some, 8, 2), images[:10])


def test_sample_set_with_interrupted_packing(images, tmp_path):
    as_sample_set(tmp_path, images[:8])
    as_tars(tmp_path, images[:8])
    image_set = open_images(tmp_path)
    assert np.array_equal(read(image_set, 8, 1), images[:8])


def test_sample_set_of_which_only_the_npz_is_left(images, tmp_path):
    as_npz(tmp_path, images)
    (tmp_path / "settings.json").write_text(json.dumps({"count": COUNT}))
    assert np.array_equal(read(open_images(tmp_path), 8, 1), images)


def test_shards(images, tmp_path):
    write_shards(array_source(images, np.zeros(COUNT, np.int64)), str(tmp_path / "shards"))
    image_set = ShardImageSet(open_index(str(tmp_path / "shards")), SIDE)
    assert image_set.count == COUNT
    assert len(read(image_set, 8, 1)) == COUNT
    assert np.array_equal(read(image_set, 8, 1), read(image_set, 32, 4))


def test_errors_of_folders(images, tmp_path):
    def refuse(message, path, limit=None, reading=False):
        if reading:
            image_set = open_images(path, limit)
        with pytest.raises(UserError, match=message):
            list(image_set.chunks(8, slice(0, 8))) if reading else open_images(path, limit)

    refuse("nothing: there is no such", tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse("no images", empty)
    done = tmp_path / "done"
    done.mkdir()
    as_sample_set(done, images)
    refuse(r"22 images .* has 21.*--num-images 1 to 21", done, 22)
    refuse("0 images", done, 0)
    (done / "000004.png").unlink()
    refuse("unfinished.*20 of 21", done)

    files = tmp_path / "files"
    files.mkdir()
    as_files(files, images[:3])
    (files / "000002.png").write_bytes(png(images[0])[:60])
    refuse(r"000002\.png: not a readable image", files, reading=True)
    (files / "000002.png").write_bytes(png(images[0][:6]))
    refuse(r"000002\.png: 12 x 6 pixels.*12 x 12", files, reading=True)
    (files / "000000.png").write_bytes(png(images[0][:6]))
    refuse(r"000000\.png: 12 x 6 pixels; .* square", files)

    tars = tmp_path / "tars"
    tars.mkdir()
    as_tars(tars, images)
    cut = tars / "samples-000008.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    refuse(r"samples-000008\.tar.*damaged", tars)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, r"arr_0 .*missing.* images"),
        ({"arr_0": np.zeros((3, 8, 8, 3))}, r"arr_0 is float64 \(3, 8, 8, 3\); it must be uint8"),
        ({"arr_0": np.zeros((3, 3, 8, 8), np.uint8)}, r"uint8 \(3, 3, 8, 8\); it must"),
        ({"arr_0": np.zeros((3, 8, 6, 3), np.uint8)}, r"uint8 \(3, 8, 6, 3\); it must"),
        ({"arr_0": np.array([{}])}, "arr_0"),
    ],
)
def test_npz_files_without_images(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"a\.npz.*{message}"):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_npz_files(tmp_path, images, writer):
    path = tmp_path / "a.npz"
    writer(path, arr_0=images)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file"):
        open_images(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file"):
        list(NpzImages(path, "samples").chunks(4))
