"""Image folders as a source: class lists, links, and errors."""

import os
from pathlib import Path

import pytest
from PIL import Image

from rae_xla.data.shards.sources import folder_source, open_image_source
from rae_xla.data.shards.writer import make_shards
from rae_xla.errors import UserError


def _identity(path: Path) -> tuple[int, int]:
    """Return inode and time of change, which a rewritten file would not keep."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_labels_from_a_list_of_classes(tmp_path, image_folder):
    names = ("emu", "dog", "fox", "cat")
    source = folder_source(str(image_folder), class_names=names)
    expected = {"emu": 0, "dog": 1, "cat": 3}
    for path, label in source.items:
        assert expected[path.removeprefix(f"{image_folder}/").split("/")[0]] == label
    index = make_shards(source, str(tmp_path / "out"))
    assert index.class_names == names
    assert sorted(index.samples["label"].tolist()) == [0, 0, 1, 1, 3, 3]


def test_a_folder_without_a_label_is_one_error(image_folder):
    with pytest.raises(UserError, match="--classes gives no label to the folder cat, emu:"):
        open_image_source(str(image_folder), class_names=("dog",))


def test_the_content_hash_does_not_depend_on_the_location(tmp_path, image_folder):
    source = folder_source(str(image_folder))
    other = image_folder.rename(tmp_path / "moved")
    assert folder_source(f"{other}/").contents == source.contents
    assert folder_source(str(other), shuffle=False).contents != source.contents
    assert folder_source(str(other), class_names=("emu", "dog", "cat")).contents != source.contents
    (other / "dog" / "a.JPEG").rename(other / "dog" / "b.JPEG")
    assert folder_source(str(other)).contents != source.contents


def test_an_error_names_an_image_that_disappeared(image_folder):
    source = folder_source(str(image_folder), shuffle=False)
    (image_folder / "cat" / "grey.png").unlink()
    with pytest.raises(UserError, match=r"grey\.png: cannot be read \(No such file"):
        list(source)


def test_finished_shards_are_kept_after_an_image_was_repaired(tmp_path, image_folder):
    """In the order of the folder: two of cat, two of dog (a.JPEG, then b.png), two of emu."""
    source = folder_source(str(image_folder), shuffle=False)
    expected = make_shards(source, str(tmp_path / "expected"), samples_per_shard=1)
    broken = image_folder / "dog" / "big" / "old" / "b.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"b\.png: not a readable image .*; repair it"):
        make_shards(source, str(out), samples_per_shard=1)
    broken.write_bytes(content)
    kept = _identity(out / "shard-000001.tar")
    again = folder_source(str(image_folder), shuffle=False)
    assert make_shards(again, str(out), samples_per_shard=1).fingerprint == expected.fingerprint
    assert _identity(out / "shard-000001.tar") == kept
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "expected").iterdir()
    )


def test_a_link_to_a_parent_folder_is_an_error(image_folder):
    (image_folder / "dog" / "loop").symlink_to(image_folder)
    with pytest.raises(UserError, match=r"dog/loop: a link to a parent folder"):
        folder_source(str(image_folder))


def test_a_link_to_images_elsewhere_is_followed(image_folder, tmp_path):
    (tmp_path / "more").mkdir()
    (image_folder / "dog" / "a.JPEG").rename(tmp_path / "more" / "a.JPEG")
    before = len(folder_source(str(image_folder)))
    (image_folder / "dog" / "more").symlink_to(tmp_path / "more")
    assert len(folder_source(str(image_folder))) == before + 1


def test_a_class_folder_whose_name_is_not_utf8(image_folder):
    os.mkdir(os.fsencode(image_folder) + b"/\xff\xfe")
    with pytest.raises(UserError, match="is not valid UTF-8: rename it") as caught:
        folder_source(str(image_folder))
    str(caught.value).encode()


@pytest.mark.parametrize("inside", ["", "dog/out", "."])
def test_shards_are_not_written_to_a_folder_with_other_files(image_folder, inside):
    out = image_folder / inside if inside else image_folder
    if inside == "dog/out":
        (out / "below").mkdir(parents=True)
    (image_folder / "README.md").unlink()
    with pytest.raises(UserError, match="the folder is not empty"):
        make_shards(folder_source(str(image_folder), shuffle=False), str(out))


def _numbered(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / name / "a.png")
    return str(folder)


def test_numbered_folders_have_their_numbers_as_labels(tmp_path, caplog):
    names = [str(number) for number in range(12)]
    source = folder_source(_numbered(tmp_path / "f", names), shuffle=False)
    assert source.classes == tuple(names)
    assert [(path.split("/")[-2], label) for path, label in source.items] == [
        (name, label) for label, name in enumerate(names)
    ]
    assert not caplog.records


def test_numbers_that_cannot_be_the_labels_are_a_warning(tmp_path, caplog):
    source = folder_source(_numbered(tmp_path / "f", ["1", "2", "10"]))
    assert source.classes == ("1", "2", "10")
    assert "class folder 1 has the label 0, so labels and names differ" in caplog.text


def test_everything_else_in_the_folder_is_counted_once(tmp_path, image_folder, caplog):
    caplog.set_level("INFO")
    (image_folder / "cat" / "x.dng").touch()
    (image_folder / ".cache").mkdir()
    os.mkfifo(image_folder / "cat" / "pipe.png")
    (image_folder / "gone.png").symlink_to("nowhere.png")
    (image_folder / "loop").symlink_to("loop")
    assert len(folder_source(str(image_folder))) == 6
    [record] = caplog.records
    assert record.levelname == "WARNING"
    for part in ("2 hidden (", "1 .txt (", "1 .md (", "1 .dng (", "1 pipe, socket or device (",
                 "2 link without a target ("):  # fmt: skip
        assert part in record.getMessage()


def test_a_class_without_images_says_what_there_is(tmp_path, image_folder):
    (image_folder / "fox").mkdir()
    with pytest.raises(UserError, match=r"fox: the folder of class fox has no images: ext"):
        folder_source(str(image_folder))
    (image_folder / "fox" / "a.cr2").touch()
    with pytest.raises(
        UserError, match=r"it contains 1 \.cr2 \(.*raw file.*extensions that are read"
    ):
        folder_source(str(image_folder))
    for name in ("a", "b"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{name}.txt").touch()
    with pytest.raises(UserError, match=r"sub-folder of images per class \(it contains 2 \.txt"):
        folder_source(str(tmp_path / "flat"))
