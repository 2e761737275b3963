import argparse
import os

import numpy as np
import pytest
from PIL import Image

from rae_xla.cli import shards
from rae_xla.data.shards import open_index
from rae_xla.errors import UserError


def _run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    return shards.run(parser.parse_args([str(word) for word in words]))


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
    words = ("--labels", tmp_path / "y.npy", "--keep-order", "--shard-size", "3KB")
    assert _run("make", tmp_path / "x.npy", out, *words) == 0
    index = open_index(str(out))
    assert index.samples["label"].tolist() == [3, 0, 2, 0]
    assert len(index.shards) == 4


def test_the_options_for_arrays_and_workers_agree(tmp_path, images):
    for workers in (1, 2):
        _run("make", images, tmp_path / f"out{workers}", "--workers", workers)
    one, two = (open_index(str(tmp_path / f"out{workers}")) for workers in (1, 2))
    assert one.fingerprint == two.fingerprint


def test_bad_input_is_one_error(tmp_path, images):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        _run("make", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--image-size is 0"):
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
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        shards.parse_bytes(text)
