"""``rae-xla shards``: sub-commands, options and output."""

import argparse
import io
import os
import tarfile

import numpy as np
import pytest
from foreign_tars import write_imagenet
from PIL import ExifTags, Image

from rae_xla.cli import shards
from rae_xla.data.reader import read_image
from rae_xla.data.shards.index import open_index
from rae_xla.errors import UserError


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    return shards.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_make_then_verify(tmp_path, images, capsys):
    out = tmp_path / "out"
    assert _run("make", images, out, "--image-size", 16, "--samples-per-shard", 5) == 0
    assert "12 images of 2 classes in 3 shards" in capsys.readouterr().out
    assert open_index(str(out)).class_names == ("ant", "bee")
    assert _run("verify", out) == 0
    assert f"{out}: ok, 12 images of 2 classes in 3 shards" in capsys.readouterr().out


def test_verify_prints_every_fault_and_fails(tmp_path, images, capsys):
    out = tmp_path / "out"
    _run("make", images, out, "--samples-per-shard", 5)
    (out / "shard-000000.tar").unlink()
    os.truncate(out / "shard-000002.tar", 3000)
    capsys.readouterr()
    assert _run("verify", out) == 1
    printed = capsys.readouterr().out
    assert "fault: shard-000000.tar: missing" in printed
    assert "fault: shard-000002.tar: truncated: 3000 bytes" in printed


def test_arrays_in_the_order_given(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    np.save(tmp_path / "y.npy", np.array([3, 0, 2, 0]))
    out = tmp_path / "out"
    options = ("--labels", tmp_path / "y.npy", "--keep-order", "--shard-size", "3KB")
    assert _run("make", tmp_path / "x.npy", out, *options) == 0
    index = open_index(str(out))
    assert index.samples["label"].tolist() == [3, 0, 2, 0]
    assert len(index.shards) == 4


def test_shards_do_not_depend_on_workers(tmp_path, images):
    for workers in (1, 2):
        _run("make", images, tmp_path / f"out{workers}", "--workers", workers)
    one, two = (open_index(str(tmp_path / f"out{workers}")) for workers in (1, 2))
    assert one.fingerprint == two.fingerprint


def test_bad_input_is_one_error(tmp_path, images):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        _run("make", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--image-size 0: expected"):
        _run("make", images, tmp_path / "out", "--image-size", 0)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        _run("verify", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256_000_000), ("1GiB", 2**30), ("1.5 kb", 1500), ("4096", 4096)],
)
def test_sizes(text, size):
    assert shards.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "12XB", "-3MB"])
def test_invalid_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        shards.parse_bytes(text)


@pytest.mark.parametrize("text", ["0MB", "0.1", "9999GB", "9" * 400])
def test_sizes_that_no_shard_has(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 byte to 1 TB"):
        shards.parse_bytes(text)


def test_shards_are_not_written_into_their_source(tmp_path, images):
    with pytest.raises(UserError, match="give a folder outside of it"):
        _run("make", images, images / "shards")
    assert not (images / "shards").exists()


def test_index_verify_and_stats_of_the_public_imagenet_layout(tmp_path, capsys):
    pattern = write_imagenet(tmp_path / "tars")
    (tmp_path / "classes.txt").write_text("tench\ngoldfish\nshark\n")
    out = tmp_path / "index"
    options = ("--out", out, "--classes", tmp_path / "classes.txt", "--workers", 2)
    assert _run("index", pattern, *options) == 0
    assert f"{out}: 21 images of 3 classes in 3 shards" in capsys.readouterr().out
    assert open_index(str(out)).class_names == ("tench", "goldfish", "shark")
    assert _run("verify", out, "--workers", 2) == 0
    assert ": ok, 21 images of 3 classes" in capsys.readouterr().out
    assert _run("stats", out, "--sample", 10, "--out", tmp_path / "x.png") == 0
    printed = capsys.readouterr().out
    assert "of 10 images examined" in printed
    assert "images per class  7 of each" in printed
    assert (tmp_path / "x.png").stat().st_size > 10_000
    os.truncate(tmp_path / "tars" / "imagenet1k-train-0001.tar", 4000)
    assert _run("verify", out) == 1
    assert "fault: imagenet1k-train-0001.tar: truncated" in capsys.readouterr().out
    with pytest.raises(UserError, match="the index does not match its shards"):
        _run("stats", out)


def test_the_options_of_make(tmp_path, images):
    (tmp_path / "classes.json").write_text('{"bee": 0, "ant": 1}')
    options = ("--image-size", 8, "--resize", "bicubic", "--quality", 90)
    _run("make", images, tmp_path / "out", *options, "--classes", tmp_path / "classes.json")
    index = open_index(str(tmp_path / "out"))
    assert index.class_names == ("bee", "ant")
    with tarfile.open(index.path_of(index.shards[0])) as tar:
        assert tar.getnames()[0] == "000000000.jpg"
    for options, message in [
        (("--resize", "adm"), "--resize adm has no effect without --image-size"),
        (("--quality", 0), "--quality 0: expected"),
        (("--workers", 0), "--workers 0: expected"),
        (("--classes", tmp_path / "nowhere"), "nowhere: no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            _run("make", images, tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()
    for command in ("index", "verify"):
        with pytest.raises(UserError, match="--workers 0: expected"):
            _run(command, tmp_path / "out", "--workers", 0)
    # Checked before the source is opened.
    with pytest.raises(UserError, match="has finished shards already"):
        _run("make", tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "a.avif",
            b"x",
            r"d/cat/a\.avif: not a readable image \(it is damaged, or not in a format",
        ),
        ("a.jpg", b"", r"e/cat/a\.jpg: not a readable image \(the file is empty\)"),
    ],
)
def test_messages_say_what_is_there(tmp_path, images, file, content, message):
    folder = images.rename(tmp_path / message[0])
    (folder / "cat").mkdir()
    (folder / "cat" / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        _run("make", folder, tmp_path / "out")
    assert "0x" not in str(caught.value)


def test_phone_images_are_made_upright(tmp_path, images, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (24, 20)).save(images / "ant" / "phone.jpg", exif=exif)
    _run("make", images, tmp_path / "out", "--upright")
    index = open_index(str(tmp_path / "out"))
    sizes = [Image.open(io.BytesIO(read_image(index, i))).size for i in range(len(index))]
    assert sorted(sizes)[0] == (20, 24)
