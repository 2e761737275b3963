"""Classes of an image folder, numbered by a list instead of by name."""

import pytest

from rae_xla.data.shards import make_shards
from rae_xla.data.sources import folder_source, open_source
from rae_xla.errors import UserError


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
        open_source(str(image_folder), class_names=("dog",))


def test_the_contents_are_named_wherever_the_folder_lies(tmp_path, image_folder):
    source = folder_source(str(image_folder))
    other = image_folder.rename(tmp_path / "moved")
    assert folder_source(f"{other}/").contents == source.contents
    assert folder_source(str(other), shuffle=False).contents != source.contents
    assert folder_source(str(other), class_names=("emu", "dog", "cat")).contents != source.contents
    (other / "dog" / "a.JPEG").rename(other / "dog" / "b.JPEG")
    assert folder_source(str(other)).contents != source.contents


def test_an_image_that_disappears_is_named(image_folder):
    source = folder_source(str(image_folder), shuffle=False)
    (image_folder / "cat" / "grey.png").unlink()
    with pytest.raises(UserError, match=r"grey\.png: cannot be read \(No such file"):
        list(source)


def test_an_image_that_is_mended_costs_no_finished_shard(tmp_path, image_folder):
    """In the order of the folder: two of cat, two of dog (a.JPEG, then b.png), two of emu."""
    source = folder_source(str(image_folder), shuffle=False)
    whole = make_shards(source, str(tmp_path / "whole"), samples_per_shard=1)
    broken = image_folder / "dog" / "big" / "old" / "b.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"b\.png: not a readable image .*; mend it"):
        make_shards(source, str(out), samples_per_shard=1)
    broken.write_bytes(content)
    kept = _identity(out / "shard-000001.tar")
    again = folder_source(str(image_folder), shuffle=False)
    assert make_shards(again, str(out), samples_per_shard=1).fingerprint == whole.fingerprint
    assert _identity(out / "shard-000001.tar") == kept
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
