"""The search for images: what is taken, and the account of what is not."""

import io
import os

import pytest
from PIL import ExifTags, Image

from rae_xla.data.image_decoding import MORE_FRAMES, ROTATED, decode_rgb, is_rotated
from rae_xla.data.image_finder import (
    MAX_REASONS,
    ImageNotes,
    LeftOut,
    find_files,
    no_images_message,
)
from rae_xla.errors import UserError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("a.jpg", "b/c.JFIF", "b/d/e.png", "b/._e.png", ".thumbs/f.png", "b/notes.txt",
                 "g.dng", "h.dng", "README", "b/archive.tar.gz", ".DS_Store"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    return root


def test_everything_is_taken_or_counted_once(folder):
    left_out = LeftOut()
    found = find_files(folder, left_out)
    assert [os.path.relpath(path, folder) for path in found] == ["a.jpg", "b/c.JFIF", "b/d/e.png"]
    assert left_out.counts == {
        "hidden": 3,
        ".dng": 2,
        ".txt": 1,
        ".gz": 1,
        "without extension": 1,
        "link without a target": 2,
        "pipe, socket or device": 1,
    }
    assert left_out.first["hidden"] == str(folder / ".DS_Store")
    assert left_out.first["link without a target"] == str(folder / "gone.png")
    assert str(left_out).startswith(f"3 hidden ({folder}/.DS_Store, …), 2 .dng ({folder}/g.dng, …")
    assert find_files(str(folder), LeftOut(), ("gz",)) == [str(folder / "b" / "archive.tar.gz")]


def test_images_that_are_not_read_are_a_warning(folder, caplog):
    caplog.set_level("INFO")
    left_out = LeftOut()
    find_files(folder / "b", left_out)
    left_out.log("b")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "b: left out 1 .gz" in caplog.text
    find_files(folder, left_out)
    left_out.log("photos")
    assert caplog.records[-1].levelname == "WARNING"
    assert "g.dng, …: a raw file: convert it)" in caplog.text
    LeftOut().log("nothing")
    assert len(caplog.records) == 2


def test_counts_are_merged_and_limited():
    one, two = LeftOut(), LeftOut()
    one.add_file("a.txt")
    two.add_file("b.txt")
    two.add_file("c.dng")
    one.merge(two)
    assert str(one) == "2 .txt (a.txt, …), 1 .dng (c.dng: a raw file: convert it)"
    assert one.images
    for number in range(1000):
        one.add_file(f"x.{number}")
    assert len(one.counts) == MAX_REASONS + 1
    assert sum(one.counts.values()) == 1003
    assert str(one).endswith(" more")
    assert len(str(one)) < 400


def test_names_that_are_not_utf8(tmp_path):
    left_out = LeftOut()
    name = os.fsdecode(b"\xff.txt")
    (tmp_path / name).touch()
    assert find_files(tmp_path, left_out) == []
    str(left_out).encode()
    assert "read: avif, bmp" in no_images_message(LeftOut())
    assert "it contains 1 .txt" in no_images_message(left_out)


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "b" / "y.png").touch()
    (tmp_path / "a" / "to_b").symlink_to("../b")
    found = find_files(tmp_path / "a", LeftOut())
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a/to_b/y.png", "a/x.png"]
    (tmp_path / "b" / "to_a").symlink_to("../a")
    for start in ("a", "b", "."):
        with pytest.raises(UserError, match="a link to a parent folder"):
            find_files(tmp_path / start, LeftOut())


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere: the folder cannot be read \(No such file"):
        find_files(tmp_path / "nowhere", LeftOut())
    (tmp_path / "closed").mkdir(mode=0)
    if not os.access(tmp_path / "closed", os.R_OK):  # root reads everything
        with pytest.raises(UserError, match=r"closed: the folder cannot be read \(Permission"):
            find_files(tmp_path, LeftOut())


def test_what_is_not_read_of_images_is_counted_by_the_decoder(caplog):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    notes = ImageNotes()
    for number, kind in enumerate(["JPEG", "PNG", "AVIF", "BMP"]):
        buffer = io.BytesIO()
        options = {} if kind == "BMP" else {"exif": exif}
        Image.new("RGB", (4, 6)).save(buffer, kind, **options)
        decode_rgb(buffer.getvalue(), f"{number}.x", notes)
        assert is_rotated(buffer.getvalue()) == (kind == "JPEG")
    assert notes.counts == {ROTATED: 2}  # AVIF is upright
    notes.log("photos")
    assert caplog.messages == ["photos: images 2 with an EXIF rotation, which is ignored (0.x, …)"]
    assert not is_rotated(b"\xff\xd8 damaged")


def test_animations_and_pages_are_counted_by_the_decoder():
    """The second image of a phone's JPEG belongs to the first."""
    frames = [Image.new("RGB", (8, 8), (number * 90, 0, 0)) for number in range(3)]
    notes = ImageNotes()
    for kind in ("GIF", "TIFF", "WEBP", "PNG", "AVIF", "MPO"):
        for count in (1, 3):
            buffer = io.BytesIO()
            frames[0].save(buffer, kind, save_all=True, append_images=frames[1:count])
            image = decode_rgb(buffer.getvalue(), f"{count}.{kind}", notes)
            assert max(image.getpixel((4, 4))) < 10  # of the first frame
            if kind in ("GIF", "TIFF"):  # the first frame is intact
                decode_rgb(buffer.getvalue()[:-20] if count == 3 else buffer.getvalue(), "cut")
    assert notes.counts == {MORE_FRAMES: 5}
    assert notes.first == {MORE_FRAMES: "3.GIF"}
