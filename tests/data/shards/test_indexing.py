"""Indexing existing WebDataset tars: layouts, damaged tars, and errors."""

import gc
import io
import os
import tarfile

import numpy as np
import pytest
from foreign_tars import imagenet_members, jpeg, write_imagenet, write_tar

from rae_xla.data.loader import one_pass
from rae_xla.data.reader import load_sample, read_image
from rae_xla.data.shards.index import open_index, read_index
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.tar_samples import HashingReader, read_samples, scan_samples
from rae_xla.data.shards.verify import verify
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


def _message(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        index_shards(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_public_imagenet_layout(tmp_path):
    write_imagenet(tmp_path)
    seen = []
    index = index_shards(str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert [shard.file for shard in index.shards] == [
        f"imagenet1k-train-000{i}.tar" for i in range(3)
    ]
    assert index.samples["label"].tolist() == [number % 3 for number in range(21)]
    assert index.class_names == ("0", "1", "2")
    for number in range(21):
        assert read_image(index, number) == jpeg(number)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert seen[-1] == (total, total)
    assert len(seen) == 3
    assert verify(str(tmp_path)) == []
    batches = list(one_pass(index, batch_size=8, transform=CenterCrop(16)))
    assert sorted(np.concatenate([batch["label"] for batch in batches])[:21].tolist()) == sorted(
        index.samples["label"].tolist()
    )


def test_an_index_elsewhere_has_the_names_of_the_first(tmp_path):
    write_imagenet(tmp_path / "tars")
    names = ("tench", "goldfish", "shark")
    index_shards(str(tmp_path / "tars"), class_names=names)
    assert index_shards(str(tmp_path / "tars"), str(tmp_path / "other")).class_names == names
    given = ("a", "b", "c")
    index = index_shards(str(tmp_path / "tars"), str(tmp_path / "third"), class_names=given)
    assert index.class_names == given


def test_an_index_elsewhere_and_workers(tmp_path):
    pattern = write_imagenet(tmp_path / "theirs")
    write_tar(tmp_path / "theirs" / "val-0.tar", imagenet_members(0, 3))
    before = sorted(os.listdir(tmp_path / "theirs"))
    one = index_shards(pattern, str(tmp_path / "one"))
    two = index_shards(pattern, str(tmp_path / "two"), workers=2)
    assert sorted(os.listdir(tmp_path / "theirs")) == before
    for name in ("index.json", "samples.npy"):
        first, second = (tmp_path / folder / name for folder in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
    assert one.folder == two.folder == str(tmp_path / "theirs")
    assert verify(str(tmp_path / "one")) == []
    assert verify(str(tmp_path / "two" / "index.json"), workers=2) == []
    assert load_sample(one, 20, CenterCrop(16), (0, 0)).shape == (16, 16, 3)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_headers_of_every_kind(tmp_path, format):
    long = "deep/" * 30 + "n" * 120
    members = [
        ("train/a.b.jpg", b"not an image: its extension is b.jpg"),
        ("train/a.JPG", jpeg(0)),
        ("train/a.cls", b" 4 "),
        (f"{long}.cls", b"1"),
        (f"{long}.jpeg", jpeg(1)),
        ("Grüße.png", jpeg(2)),
        ("Grüße.cls", b"0"),
        ("README", b"not part of a sample"),
        (".hidden.jpg", b"nor this"),
    ]
    write_tar(tmp_path / "x.tar", members, format)
    index = index_shards(str(tmp_path / "x.tar"))
    assert index.samples["label"].tolist() == [4, 1, 0]
    assert [read_image(index, number) for number in range(3)] == [jpeg(n) for n in range(3)]
    assert verify(str(tmp_path)) == []


def test_class_names(tmp_path):
    write_imagenet(tmp_path)
    names = ("tench", "goldfish", "shark", "ray")
    index = index_shards(str(tmp_path), str(tmp_path / "index"), class_names=names)
    assert index.class_names == names
    message = _message(str(tmp_path), class_names=names[:2])
    assert "a label is 2, but only 2 classes have names (0 to 1)" in message
    assert not (tmp_path / "index.json").exists()


def test_an_error_names_all_bad_tars_and_nothing_is_written(tmp_path):
    write_imagenet(tmp_path, tars=7)
    tars = sorted(tmp_path.glob("*.tar"))
    index_shards(str(tmp_path), str(tmp_path / "index"))
    offsets = np.load(tmp_path / "index" / "samples.npy")["offset"]
    os.truncate(tars[1], tars[1].stat().st_size // 2)
    # between two members, where a sample begins (before its .cls and the pax header)
    with tarfile.open(tars[2]) as tar:
        fourth = tar.getmembers()[9]
    os.truncate(tars[2], fourth.offset)
    tars[3].write_bytes(b"")
    tars[4].write_bytes(b"<html>404</html>" * 100)
    with open(tars[5], "r+b") as file:
        file.seek(int(offsets[5 * 7 + 3]) - tarfile.BLOCKSIZE)
        file.write(b"garbage")
    message = _message(str(tmp_path), workers=2)
    assert "5 of 7 tars cannot be indexed, so nothing is written" in message
    for number in range(1, 6):
        assert f"imagenet1k-train-000{number}.tar: not a complete tar after" in message
    assert "train-0002.tar: not a complete tar after 3 samples" in message
    assert "train-0000" not in message
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"")], r"sample a: the label is missing \(no \.cls member, only \.jpg\)"),
        ([("a.cls", b"1"), ("a.txt", b"")], r"sample a: the image is missing .* \.cls, \.txt\)"),
        ([("a.cls", b"cat"), ("a.jpg", b"")], "sample a: the label b'cat' is not a number"),
        ([("a.cls", b"-1"), ("a.jpg", b"")], "sample a: the label b'-1' is not a number from 0"),
        ([("a.cls", b"1"), ("a.cls", b"1"), ("a.jpg", b"")], "sample a: there are two labels"),
        ([("a.cls", b"1"), ("a.jpg", b""), ("a.png", b"")], "sample a: there are 2 images"),
        (
            [("a.cls", b"1"), ("a.jpg", b""), ("b.cls", b"1"), ("b.jpg", b""), ("a.txt", b"")],
            "sample a: the key appears a second time",
        ),
        ([("a.cls", b"99999999"), ("a.jpg", b"x")], "a label is 99999999"),
        ([("README", b"")], "there is no sample in it"),
    ],
)
def test_invalid_samples(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        index_shards(str(tmp_path))


def test_invalid_sources_and_targets(tmp_path):
    assert "nowhere: no such folder or tar file" in _message(str(tmp_path / "nowhere"))
    assert "there is no .tar file in this folder" in _message(str(tmp_path))
    write_imagenet(tmp_path / "x", tars=2)
    pattern = str(tmp_path / "x" / "imagenet1k-train-{0000..0009}.tar")
    assert "0004.tar and 5 more of 10: no such file" in _message(pattern)
    one = str(tmp_path / "x" / "imagenet1k-train-0001.tar")
    assert "the folder holds 1 other tars (imagenet1k-train-0000.tar, …)" in _message(one)
    index_shards(str(tmp_path / "x"))
    assert f"{tmp_path}/x/index.json exists already" in _message(str(tmp_path / "x"))
    (tmp_path / "x" / "index.json").unlink()
    assert f"{tmp_path}/x/samples.npy exists already" in _message(str(tmp_path / "x"))
    write_tar(tmp_path / "y" / "a.tar", imagenet_members(0, 1))
    both = str(tmp_path / "{x/imagenet1k-train-0000,y/a}.tar")
    assert "an index covers one folder" in _message(both)


def test_verify_finds_what_changed_in_foreign_shards(tmp_path):
    write_imagenet(tmp_path / "tars", tars=5)
    index = index_shards(str(tmp_path / "tars"), str(tmp_path / "index"))
    tars = sorted((tmp_path / "tars").glob("*.tar"))
    with tarfile.open(tars[0]) as tar:
        os.truncate(tars[0], tar.getmembers()[9].offset)
    write_tar(tars[1], imagenet_members(7, 9))
    with open(tars[2], "r+b") as file:
        file.seek(int(index.samples["offset"][14]) + 300)
        file.write(b"!!!")
    tars[3].unlink()
    for workers in (1, 2):
        faults = [str(fault) for fault in verify(str(tmp_path / "index"), workers=workers)]
        text = "\n".join(faults)
        assert "imagenet1k-train-0000.tar: not a complete tar after 3 samples" in text
        assert "imagenet1k-train-0000.tar: has 3 complete samples, the index lists 7" in text
        assert "imagenet1k-train-0001.tar: has 9 complete samples, the index lists 7" in text
        assert "train-0002.tar: sample 14 (n00000002_14): the image changed" in text
        assert "train-0002.tar: changed after the index was written" in text
        assert "train-0003.tar: missing" in text
        assert "train-0004" not in text
    (tmp_path / "tars").rename(tmp_path / "moved")
    assert {str(fault).split(": ")[1] for fault in verify(str(tmp_path / "index"))} == {"missing"}


def test_tars_behind_a_url(tmp_path):
    write_imagenet(tmp_path)
    local = index_shards(str(tmp_path), str(tmp_path / "local"))
    remote = index_shards(
        f"file://{tmp_path}/imagenet1k-train-{{0000..0002}}.tar", f"file://{tmp_path}/remote"
    )
    assert remote.folder == f"file://{tmp_path}"
    assert remote.fingerprint == local.fingerprint
    assert read_index(f"file://{tmp_path}/remote").folder == remote.folder
    assert read_image(open_index(f"file://{tmp_path}/remote"), 5) == jpeg(5)
    assert verify(f"file://{tmp_path}/remote") == []


@pytest.mark.parametrize("mode", ["read", "scan", "scan without seeking"])
def test_headers_of_a_tar_are_not_kept_in_memory(tmp_path, mode):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{n:05d}.{e}", b"7") for n in range(3000) for e in ("jpg", "cls")])
    content = path.read_bytes()
    file = io.BytesIO(content)
    if mode == "scan without seeking":
        file.seekable = lambda: False
    samples = read_samples(HashingReader(file)) if mode == "read" else scan_samples(file)
    gc.collect()
    before = _headers()
    seen = []
    for number, sample in enumerate(samples):
        seen.append((sample.key, sample.label, content[sample.offset : sample.offset + 1]))
        if number % 1000 == 999:
            assert _headers() - before < 10
    assert seen == [(f"{n:05d}", b"7", b"7") for n in range(3000)]


def _headers() -> int:
    return sum(type(thing) is tarfile.TarInfo for thing in gc.get_objects())
