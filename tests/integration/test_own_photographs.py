"""A data set of one's own, from photographs of a phone to the report, with results in a bucket."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from rae_xla import storage
from rae_xla.cli.main import main
from rae_xla.data.image_decoding import IMAGE_EXTENSIONS
from rae_xla.data.shards.index import open_index
from rae_xla.sample.generated_folder import IMAGES_KEY
from rae_xla.sample.tiny_model import write_tiny_model
from rae_xla.train import remote_results


@pytest.fixture
def folder(run_folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder in a bucket; the working directory is one to which nothing may be written."""
    monkeypatch.setattr(remote_results, "MIN_PAUSE", 0.01)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run_folder


@pytest.fixture(autouse=True)
def _logs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let pytest see the logs of the command line."""
    caplog.set_level("INFO")
    monkeypatch.setattr("rae_xla.progress.configure_logging", lambda: None)
    yield
    logging.getLogger("rae_xla").setLevel(logging.NOTSET)


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def photograph(path: Path, seed: int) -> None:
    """Write a photograph in the format that its name says, rotated by its EXIF data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = np.random.default_rng(seed).integers(0, 255, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


def train(config: Path, shards: str, results: str, *settings: str) -> None:
    run(
        *("train", "stage2", "--config", config, "--results-dir", results),
        *(f"data.train={shards}", "runtime.backend=torch", "stage_2.ckpt=null"),
        *("training.global_batch_size=4", "training.steps=1", "training.sample_every=1"),
        *settings,
    )


def generate(results: str, name: str) -> list[dict]:
    out = f"{results}-images"
    run(
        *("generate", "--model", results, "--out", out, "--classes", name),
        *("--num-samples", 1, "--num-steps", 2, "runtime.backend=torch"),
    )
    return json.loads(storage.read_bytes(f"{out}/generated.json"))[IMAGES_KEY]


def test_photographs_in_numbered_folders(folder, tmp_path, caplog, capsys):
    photos, shards = tmp_path / "photos", f"{folder}/shards"
    for label in range(12):
        photograph(photos / f"{label}/IMG_{label}.{('jpg', 'avif', 'JPEG')[label % 3]}", label)
    (photos / "3/IMG_3.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    (photos / "3/._IMG_3.heic").touch()
    if "heic" in IMAGE_EXTENSIONS:  # the package for them is installed, and the file is not valid
        assert main(["shards", "make", str(photos), shards]) == 2
        assert "IMG_3.heic: not a readable image" in capsys.readouterr().err
        (photos / "3/IMG_3.heic").unlink()
    run("shards", "make", photos, shards)
    index = open_index(shards)
    assert index.class_names == tuple(map(str, range(12)))
    assert sorted(index.samples["label"].tolist()) == list(range(12))
    if "heic" not in IMAGE_EXTENSIONS:
        assert "1 .heic (" in caplog.text
        assert "`pip install pillow-heif` to read it" in caplog.text
    assert "1 hidden (" in caplog.text
    assert f"{shards}: images 8 with an EXIF rotation, which is ignored" in caplog.text
    assert "--upright stores rotated images as they are viewed" in caplog.text
    caplog.clear()
    run("shards", "verify", shards)
    assert f"{shards}: images 8 with an EXIF rotation" in caplog.text

    config = write_tiny_model(tmp_path)
    results = f"{folder}/run"
    train(config, shards, results, "misc.num_classes=12", "stage_2.params.num_classes=12")
    [image] = generate(results, "10")
    assert (image["label"], image["class"]) == (10, "10")
    run("report", results)
    assert b"train/loss" in storage.read_bytes(f"{results}/report.html")
    assert not any((tmp_path / "here").iterdir())


def test_a_thousand_classes_have_their_own_names(folder, tmp_path):
    """ImageNet has as many."""
    photos, shards = tmp_path / "photos", f"{folder}/shards"
    for label in range(1000):
        (photos / f"thing {label:03d}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (label % 256, 0, 0)).save(photos / f"thing {label:03d}/a.png")
    run("shards", "make", photos, shards)
    train(write_tiny_model(tmp_path), shards, f"{folder}/run")
    [image] = generate(f"{folder}/run", "thing 999")
    assert (image["label"], image["class"]) == (999, "thing 999")
    assert not any((tmp_path / "here").iterdir())
