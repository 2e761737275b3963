"""The same pictures in every layout, shared among processes; and what no set is."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from rae_xla.data.shards import open_index, write_shards
from rae_xla.data.sources import array_source
from rae_xla.errors import UserError
from rae_xla.evaluate.npz_images import NpzImages
from rae_xla.evaluate.picture_sets import ShardPictures, open_pictures

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
    "by name": lambda folder, images: as_files(folder, images, "class-{1}/picture-{0:03d}.png"),
    "a sample set": as_sample_set,
    "tars": as_tars,
}


def read(pictures, rows, processes):
    """All pictures, from what each process gets of each chunk."""
    share = rows // processes
    slices = [slice(i * share, (i + 1) * share) for i in range(processes)]
    own = [list(pictures.chunks(rows, each)) for each in slices]
    assert {len(chunks) for chunks in own} == {-(-pictures.count // rows)}
    assert all(len(part) <= share for chunks in own for part in chunks)
    found = [part for chunk in zip(*own, strict=True) for part in chunk]
    return np.concatenate(found).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pictures(layout, images, tmp_path):
    pictures = open_pictures(LAYOUTS[layout](tmp_path, images))
    assert (pictures.count, pictures.side) == (COUNT, SIDE)
    for rows, processes in [(8, 1), (8, 2), (32, 4)]:
        assert np.array_equal(read(pictures, rows, processes), images)
    some = open_pictures(tmp_path if layout != "npz" else tmp_path / "samples.npz", 10)
    assert np.array_equal(read(some, 8, 2), images[:10])


def test_a_set_killed_while_its_tars_were_made(images, tmp_path):
    as_sample_set(tmp_path, images[:8])
    as_tars(tmp_path, images[:8])
    pictures = open_pictures(tmp_path)
    assert np.array_equal(read(pictures, 8, 1), images[:8])


def test_the_npz_alone_is_left_of_a_sample_set(images, tmp_path):
    as_npz(tmp_path, images)
    (tmp_path / "settings.json").write_text(json.dumps({"count": COUNT}))
    assert np.array_equal(read(open_pictures(tmp_path), 8, 1), images)


def test_shards(images, tmp_path):
    write_shards(array_source(images, np.zeros(COUNT, np.int64)), str(tmp_path / "shards"))
    pictures = ShardPictures(open_index(str(tmp_path / "shards")), SIDE)
    assert pictures.count == COUNT
    assert len(read(pictures, 8, 1)) == COUNT
    assert np.array_equal(read(pictures, 8, 1), read(pictures, 32, 4))


def test_what_is_no_set(images, tmp_path):
    def refuse(message, path, limit=None, reading=False):
        if reading:
            pictures = open_pictures(path, limit)
        with pytest.raises(UserError, match=message):
            list(pictures.chunks(8, slice(0, 8))) if reading else open_pictures(path, limit)

    refuse("nothing: there is no such file or folder", tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse("there are no pictures", empty)
    done = tmp_path / "done"
    done.mkdir()
    as_sample_set(done, images)
    refuse(r"22 pictures cannot be had .* has 21.*--num-images 1 to 21", done, 22)
    refuse("0 pictures cannot be had", done, 0)
    (done / "000004.png").unlink()
    refuse("20 pictures of 21 are there.*draws the rest", done)

    files = tmp_path / "files"
    files.mkdir()
    as_files(files, images[:3])
    (files / "000002.png").write_bytes(png(images[0])[:60])
    refuse(r"000002\.png: not a readable picture", files, reading=True)
    (files / "000002.png").write_bytes(png(images[0][:6]))
    refuse(r"000002\.png: 12 x 6 pixels, the first has 12 x 12", files, reading=True)
    (files / "000000.png").write_bytes(png(images[0][:6]))
    refuse(r"000000\.png: 12 x 6 pixels; .* square", files)

    tars = tmp_path / "tars"
    tars.mkdir()
    as_tars(tars, images)
    cut = tars / "samples-000008.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    refuse(r"samples-000008\.tar: not a whole tar file", tars)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, r"no arr_0 \(images\); it has images"),
        ({"arr_0": np.zeros((3, 8, 8, 3))}, r"arr_0 is float64 \(3, 8, 8, 3\); it must be uint8"),
        ({"arr_0": np.zeros((3, 3, 8, 8), np.uint8)}, r"uint8 \(3, 3, 8, 8\); it must"),
        ({"arr_0": np.zeros((3, 8, 6, 3), np.uint8)}, r"uint8 \(3, 8, 6, 3\); it must"),
        ({"arr_0": np.array([{}])}, "arr_0"),
    ],
)
def test_npz_files_that_hold_no_pictures(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"a\.npz.*{message}"):
        open_pictures(tmp_path / "a.npz")


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_npz_files(tmp_path, images, writer):
    path = tmp_path / "a.npz"
    writer(path, arr_0=images)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file"):
        open_pictures(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file"):
        list(NpzImages(path, "samples").chunks(4))
