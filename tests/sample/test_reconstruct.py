"""``rae-xla reconstruct``: which files are read, the names of the results, and bad files."""

import logging

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.sample.reconstruct import check_outputs, find_images, output_names, read_image
from rae_xla.sample.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def write(folder, *names):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)


def reconstruct(tiny, source, out, capsys):
    """Run the command; return its exit status and its last line."""
    capsys.readouterr()
    paths = ["--config", str(tiny), "--input", str(source), "--out", str(out)]
    status = main(["reconstruct", *paths, "runtime.backend=torch"])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return status, (output.err if status else output.out).strip().splitlines()[-1]


def names_of(root, *names):
    return [str(name) for name in output_names([root / name for name in names], root)]


def test_names_are_distinct(tmp_path):
    assert names_of(tmp_path, "a.jpg", "b/a.jpg", "c.v2.webp") == ["a.png", "b/a.png", "c.v2.png"]
    assert names_of(tmp_path, "a.jpg", "a.png", "b.png") == ["a.jpg.png", "a.png.png", "b.png"]
    assert names_of(tmp_path, "A.png", "a.jpg") == ["A.png.png", "a.jpg.png"]
    assert names_of(tmp_path, "grid.png", "b/grid.png") == ["grid.png.png", "b/grid.png"]
    with pytest.raises(UserError, match=r"a\.jpg.* and .*a\.jpg\.png would both be a\.jpg\.png"):
        names_of(tmp_path, "a.jpg", "a.png", "a.jpg.png")


def test_the_output_folder_has_none_of_the_images(tmp_path, photos):
    write(photos, "a.png", "b/c.png")
    images = find_images(photos)
    check_outputs(images, photos, tmp_path / "out")
    check_outputs(images, photos, photos / "out")
    (tmp_path / "link").symlink_to(photos)
    for out in (photos, tmp_path, photos / "b", f"{photos}/b/..", tmp_path / "link"):
        with pytest.raises(UserError, match="are never overwritten"):
            check_outputs(images, photos, out)


@pytest.mark.slow
def test_the_command_writes_every_image_once(tiny, photos, tmp_path, capsys):
    write(photos, "a.jpg", "a.png", "grid.png", "b/a.png")
    before = (photos / "a.png").read_bytes()
    status, line = reconstruct(tiny, photos, photos, capsys)
    assert status == 2
    assert "contains 4 of the images" in line
    assert (photos / "a.png").read_bytes() == before
    status, line = reconstruct(tiny, photos, tmp_path / "out", capsys)
    assert status == 0
    assert "4 reconstructions" in line
    written = sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")
    )
    assert written == ["a.jpg.png", "a.png.png", "b/a.png", "grid.png", "grid.png.png"]


def test_what_is_left_out_is_logged(photos, caplog):
    caplog.set_level(logging.INFO)
    write(photos, "b.png", "c.jfif")
    (photos / "._b.png").write_bytes(b"\0\5\x16\7")
    (photos / "d.dng").touch()
    assert [path.name for path in find_images(photos)] == ["b.png", "c.jfif"]
    assert "left out 1 .dng" in caplog.text
    assert "1 hidden" in caplog.text
    for path in (photos / "b.png", photos / "c.jfif"):
        path.unlink()
    with pytest.raises(UserError, match=r"no images found: it contains 1 \.dng .*raw file"):
        find_images(photos)


def test_bad_files_are_one_error_that_names_them(photos):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (2 << 20), zip=True)
    Image.new("RGB", (64, 64)).save(photos / "text.png", pnginfo=info)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(photos / "float.tif")
    (photos / "bomb.ppm").write_bytes(b"P6 100000 100000 255\n")
    (photos / "empty.jpg").touch()
    for name, reason in (
        ("text.png", "MAX_TEXT_CHUNK"),
        ("float.tif", "floating-point"),
        ("bomb.ppm", "decompression bomb"),
        ("empty.jpg", "the file is empty"),
        ("gone.png", "No such file"),
    ):
        with pytest.raises(UserError, match=rf"{name} is not a readable image \(.*{reason}"):
            read_image(photos / name, 32)


@pytest.mark.slow
def test_rotated_images_are_reported(tiny, photos, tmp_path, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 80)).save(photos / "a.jpg", exif=exif)
    paths = ["--config", str(tiny), "--input", str(photos), "--out", str(tmp_path / "out")]
    assert main(["reconstruct", *paths, "runtime.backend=torch"]) == 0
    assert "1 with an EXIF rotation, which is ignored" in capsys.readouterr().err
