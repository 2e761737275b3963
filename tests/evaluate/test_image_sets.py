"""Image sets in every layout, read by several processes, and their errors."""

import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import ExifTags, Image

from rae_xla.config.paths import StoragePath
from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.errors import UserError
from rae_xla.evaluate.image_sets import ShardImageSet, open_images
from rae_xla.evaluate.npz_images import NpzImages
from rae_xla.sample.generated_folder import write_generated_folder
from rae_xla.sample.prompt_files import PromptFiles
from rae_xla.sample.prompts import Prompt

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
    refuse(r"samples-000008\.tar: not a complete tar after 3 samples .*: copy it again", tars)


def test_what_is_not_read_is_counted(images, tmp_path, caplog):
    caplog.set_level("INFO")
    as_files(tmp_path, images[:3])
    as_tars(tmp_path, images[3:5])
    (tmp_path / "._000000.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    as_files(tmp_path / ".cache", images[:3])
    (tmp_path / "notes.txt").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert open_images(tmp_path).count == 5
    assert "left out 2 hidden (" in caplog.text
    assert "1 .txt (" in caplog.text
    assert "1 pipe, socket or device (" in caplog.text


def test_names_with_dots_in_tars(images, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in (1, 0):
            member = tarfile.TarInfo(f"cfg1.5_{number}.png")
            member.size = len(png(images[number]))
            tar.addfile(member, io.BytesIO(png(images[number])))
    assert np.array_equal(read(open_images(tmp_path), 8, 1), images[[1, 0]])


def test_links_in_tars_and_second_tars_are_errors(images, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("b.png")
        member.type, member.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(member)
    with pytest.raises(UserError, match=r"x\.tar.*b\.png: is a hard link to a\.png"):
        open_images(tmp_path)
    as_tars(tmp_path, images[:2])
    (tmp_path / "x.tar").unlink()
    path = tmp_path / "samples-000000.tar"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match=r"samples-000000\.tar.*another tar.*at byte 10,240"):
        open_images(tmp_path)


def test_damaged_settings_are_named(images, tmp_path):
    as_sample_set(tmp_path, images[:2])
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json cannot be read"):
        open_images(tmp_path)


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


def test_rotated_images_are_counted_once(images, tmp_path, caplog):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for number in range(3):
        Image.fromarray(images[number]).save(tmp_path / f"{number}.jpg", exif=exif)
    assert len(read(open_images(tmp_path), 8, 1)) == 3
    assert caplog.messages == [
        f"samples {tmp_path}: images 3 with an EXIF rotation, which is ignored "
        f"({tmp_path}/0.jpg, …)"
    ]


def test_only_the_images_of_a_set_are_measured(images, tmp_path, caplog):
    caplog.set_level("INFO")
    as_sample_set(tmp_path, images[:4])
    (tmp_path / "000004.png").write_bytes(png(images[9]))  # of a longer set
    assert np.array_equal(read(open_images(tmp_path), 8, 1), images[:4])
    assert "left out 2 not of the set" in caplog.text


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_sets_of_prompts_are_read_completely(images, tmp_path, layout):
    """Images of different prompts have the same names in these layouts."""
    prompts = [Prompt(f"prompt {i}", f"p{i}") for i in range(3)]
    files = PromptFiles(StoragePath(tmp_path), layout, prompts, 4)
    files.prepare()
    (tmp_path / "settings.json").write_text(json.dumps({"num_prompts": 3}))
    for number in range(12):
        path = tmp_path / str(files.path(number))
        path.write_bytes(png(images[number]))
    files.finish()
    assert np.array_equal(read(open_images(tmp_path), 8, 1), images[:12])
    path.unlink()
    with pytest.raises(UserError, match="unfinished, with 11 of 12"):
        open_images(tmp_path)


def test_a_folder_of_generate(images, tmp_path):
    labels = [0, 1, 0]
    write_generated_folder(tmp_path, images[:3], labels, ["a", "b"], {})
    assert np.array_equal(read(open_images(tmp_path), 8, 1), images[:3])
    (tmp_path / "generated.json").write_text("[]")
    with pytest.raises(UserError, match=r"generated\.json cannot be read"):
        open_images(tmp_path)


def test_a_file_that_is_not_a_set(images, tmp_path):
    as_tars(tmp_path, images[:1])
    (tmp_path / "a.heic").touch()
    for name in ("samples-000000.tar", "a.heic"):
        with pytest.raises(UserError, match=rf"{name}: give an \.npz file, or the folder"):
            open_images(tmp_path / name)


def test_npz_files_with_more_bytes_than_images(tmp_path, images):
    buffer = io.BytesIO()
    np.save(buffer, images)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + bytes(5))
    with pytest.raises(UserError, match=rf"a\.npz: arr_0 has more bytes than the {COUNT} images"):
        read(open_images(tmp_path / "a.npz"), 8, 1)
