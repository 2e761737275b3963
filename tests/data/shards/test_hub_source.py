"""Parquet files of the Hugging Face hub as a source, written by ``datasets`` itself."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_tars import jpeg

from rae_xla.data.reader import read_image
from rae_xla.data.shards.encoding import Encoding
from rae_xla.data.shards.sources import open_image_source
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import make_shards
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow

datasets = pytest.importorskip("datasets")

NAMES = ["tench", "goldfish", "shark"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _write(path, count: int = 12, first: int = 0, **columns) -> None:
    """Write images 0, 1, … with labels 0, 1, 2, 0, …, and a column of captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    content = {
        "image": [{"bytes": jpeg(n), "path": None} for n in numbers],
        "label": [n % 3 for n in numbers],
        "caption": [f"number {n}" for n in numbers],
    }
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "caption": datasets.Value("string"),
    }
    for name, (values, feature) in columns.items():
        content[name], features[name] = values, feature
    table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    table.to_parquet(str(path))


def _open(path, **options):
    return open_image_source(str(path), shuffle=False, **options)


def _numbers(samples) -> list[int]:
    known = {jpeg(n): n for n in range(50)}
    return [known[sample.image] for sample in samples]


def test_bytes_order_and_class_names_are_kept(tmp_path):
    _write(tmp_path / "x.parquet")
    source = _open(tmp_path / "x.parquet")
    assert source.classes == tuple(NAMES)
    samples = list(source)
    assert _numbers(samples) == list(range(12))
    assert [sample.label for sample in samples] == [n % 3 for n in range(12)]
    assert {sample.extension for sample in samples} == {"jpg"}


def test_a_folder_with_splits(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(2):
        _write(tmp_path / "x" / "data" / f"train-0000{number}-of-00002.parquet", 5, 5 * number)
    _write(tmp_path / "x" / "data" / "validation-00000-of-00001.parquet", 4, 20)
    (tmp_path / "x" / "README.md").touch()
    (tmp_path / "x" / "data" / "._train-00000-of-00002.parquet").touch()
    assert _numbers(_open(tmp_path / "x")) == list(range(10))
    left_out = f"1 .md ({tmp_path}/x/README.md), 1 hidden ("
    assert caplog.messages[0].startswith(f"{tmp_path}/x: left out {left_out}")
    assert _numbers(_open(tmp_path / "x", split="validation")) == [20, 21, 22, 23]
    with pytest.raises(UserError, match=r"with the split 'test'.*check the name, the split"):
        _open(tmp_path / "x", split="test")


def test_workers_write_the_same_shards(tmp_path):
    _write(tmp_path / "x.parquet", 30)
    indexes = [
        make_shards(
            open_image_source(str(tmp_path / "x.parquet"), encoding=Encoding(10), workers=workers),
            str(tmp_path / str(workers)),
            samples_per_shard=8,
        )
        for workers in (1, 2)
    ]
    assert indexes[0].fingerprint == indexes[1].fingerprint
    assert indexes[0].class_names == tuple(NAMES)
    assert verify(indexes[0].folder) == []
    for name in os.listdir(indexes[0].folder):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_interrupted_call_resumes(tmp_path):
    _write(tmp_path / "x.parquet", 30)
    expected = make_shards(_open(tmp_path / "x.parquet"), str(tmp_path / "a"), samples_per_shard=8)

    def interrupted(samples, done):
        yield from (next(samples) for _ in range(20))
        raise KeyboardInterrupt

    def record_start(samples, done):
        started_at.append(done)
        return samples

    started_at: list[int] = []
    out = str(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        make_shards(_open(tmp_path / "x.parquet"), out, samples_per_shard=8, progress=interrupted)
    again = make_shards(
        _open(tmp_path / "x.parquet"), out, samples_per_shard=8, progress=record_start
    )
    assert started_at == [16]
    assert again.fingerprint == expected.fingerprint
    assert read_image(again, 29) == jpeg(29)


def test_columns_are_found_or_chosen(tmp_path):
    image, label = datasets.Image(), datasets.ClassLabel(names=["a", "b", "c", "d"])
    thumbs = [{"bytes": jpeg(30 + n), "path": None} for n in range(12)]
    _write(tmp_path / "x.parquet", thumb=(thumbs, image), coarse=([3] * 12, label))
    columns = r"image \(Image\), label \(ClassLabel\), caption \(Value string\), thumb \(Image\)"
    with pytest.raises(UserError, match=rf"2 columns of type Image.*--image-column.*{columns}"):
        _open(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"2 columns of type ClassLabel.*--label-column"):
        _open(tmp_path / "x.parquet", image_column="thumb")
    source = _open(tmp_path / "x.parquet", image_column="thumb", label_column="coarse")
    assert _numbers(source)[0] == 30
    assert source.classes == ("a", "b", "c", "d")
    with pytest.raises(UserError, match=r"no column 'other'; there are image \(Image\)"):
        _open(tmp_path / "x.parquet", image_column="other", label_column="coarse")
    with pytest.raises(UserError, match=r"column 'label' has no images"):
        _open(tmp_path / "x.parquet", image_column="label", label_column="coarse")


def test_parquet_files_of_other_tools(tmp_path):
    """Without type metadata of ``datasets``: bytes in a structure or alone, and plain labels."""
    images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(6)]
    columns = {"img": images, "raw": [image["bytes"] for image in images], "y": [4, 0, 1, 2, 3, 4]}
    columns["name"] = ["cat", "dog", "cat", "emu", "dog", "cat"]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no column of type Image; choose one with --image-column"):
        _open(tmp_path / "x.parquet")
    for image in ("img", "raw"):
        source = _open(tmp_path / "x.parquet", image_column=image, label_column="y")
        assert _numbers(source) == list(range(6))
        assert source.classes == ("0", "1", "2", "3", "4")
    options = {"image_column": "img", "label_column": "name"}
    named = _open(tmp_path / "x.parquet", **options)
    assert named.classes == ("cat", "dog", "emu")
    assert [sample.label for sample in named] == [0, 1, 0, 2, 1, 0]
    given = _open(tmp_path / "x.parquet", class_names=("ant", "emu", "dog", "cat"), **options)
    assert [sample.label for sample in given] == [3, 2, 3, 1, 2, 3]
    with pytest.raises(UserError, match="--classes gives no label to dog, emu"):
        _open(tmp_path / "x.parquet", class_names=("cat",), **options)


def test_names_of_the_classes_can_be_given(tmp_path):
    _write(tmp_path / "x.parquet")
    assert _open(tmp_path / "x.parquet", class_names=("a", "b", "c")).classes == ("a", "b", "c")
    with pytest.raises(UserError, match="a label is 2, but only 2 classes have names"):
        _open(tmp_path / "x.parquet", class_names=("a", "b"))


def test_rows_without_an_image_or_a_label(tmp_path):
    label = datasets.ClassLabel(names=NAMES)
    _write(tmp_path / "x.parquet", label=([0, 1, -1] * 4, label))
    with pytest.raises(UserError, match=r"label of row 2 is -1: the split has no labels"):
        _open(tmp_path / "x.parquet")
    _write(tmp_path / "y.parquet", label=([0, None, 1] * 4, label))
    with pytest.raises(UserError, match="label of row 1 is None"):
        _open(tmp_path / "y.parquet")
    images = [{"bytes": jpeg(n), "path": None} for n in range(12)]
    images[3], images[5] = None, {"bytes": b"garbage", "path": None}
    _write(tmp_path / "z.parquet", image=(images, datasets.Image()))
    samples = iter(_open(tmp_path / "z.parquet"))
    assert _numbers([next(samples) for _ in range(3)]) == [0, 1, 2]
    with pytest.raises(UserError, match=r"z\.parquet: row 3 has no image"):
        next(samples)
    images[3] = images[0]
    _write(tmp_path / "w.parquet", image=(images, datasets.Image()))
    with pytest.raises(UserError, match=r"w\.parquet, row 5: not a readable image"):
        list(_open(tmp_path / "w.parquet"))


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read as a data set") as caught:
        _open(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"y\.parquet: no such file"):
        _open(tmp_path / "y.parquet")


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_repository_out_of_reach_is_one_error(tmp_path):
    arguments = ("-m", "rae_xla", "shards", "make", "hf:owner/missing", str(tmp_path / "out"))
    result = _command(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("rae-xla: error: hf:owner/missing: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_extra_installed(tmp_path):
    code = (
        "import sys; sys.modules['datasets'] = None; from rae_xla.cli.main import main; "
        "sys.exit(main(['shards', 'make', 'hf:a/b', 'out']))"
    )
    result = _command("-c", code)
    assert result.returncode == 2
    assert "pip install 'rae-xla[hub]'" in result.stderr


def test_rows_that_name_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(7))
    image = [{"bytes": None, "path": str(tmp_path / "a.jpg")}] * 12
    columns = {"image": image, "label": [0] * 12}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    options = {"image_column": "image", "label_column": "label"}
    source = _open(tmp_path / "x.parquet", **options)
    assert _numbers(source) == [7] * 12
    assert np.unique([sample.label for sample in source]).tolist() == [0]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"row 0 names the file .*a\.jpg, which does not exist"):
        list(source)


def _write_names(path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": image, "label": [0] * len(names)}), path)


NAMED = {"image_column": "image", "label_column": "label"}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_rows_that_name_files_elsewhere(tmp_path, workers):
    """Rows of a data set must not read the user's files, or files from the network."""
    (tmp_path / "private.jpg").write_bytes(jpeg(7))
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "link.jpg").symlink_to(tmp_path / "private.jpg")
    (inside / "secret.jpg").write_bytes(jpeg(8))
    (tmp_path / "settle").mkdir()
    (tmp_path / "settle" / "x.jpg").write_bytes(jpeg(9))
    for name in (
        str(tmp_path / "private.jpg"),
        "../private.jpg",
        "link.jpg",
        "../settle/x.jpg",  # begins like the name of the folder
        f"file://{inside}/secret.jpg",
        "http://127.0.0.1:9/x.jpg",
        "gs://bucket/x.jpg",
        "zip://x.jpg::/x.zip",
    ):
        _write_names(inside / "x.parquet", name)
        with pytest.raises(UserError, match="row 0 names the file") as caught:
            list(_open(inside / "x.parquet", workers=workers, **NAMED))
        assert f"{name}, which is not in {inside}: only files of" in str(caught.value)
    _write_names(tmp_path / "alone" / "x.parquet", "../private.jpg")
    with pytest.raises(UserError, match=r"private\.jpg, which is not in .*alone: only files"):
        list(_open(tmp_path / "alone", workers=workers, **NAMED))


def test_rows_that_name_files_of_the_data_set(tmp_path, monkeypatch):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.jpg").write_bytes(jpeg(7))
    absolute = str(tmp_path / "set" / "images" / "a.jpg")
    _write_names(
        tmp_path / "set" / "x.parquet", "images/a.jpg", "./images/../images/a.jpg", absolute
    )
    monkeypatch.chdir("/")  # names are relative to the folder of the data set
    assert _numbers(_open(tmp_path / "set" / "x.parquet", **NAMED)) == [7, 7, 7]


def test_files_of_a_repository_are_in_the_library_cache(tmp_path, monkeypatch):
    """As the library stores them: links to ``blobs`` in the same folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for owner in ("me", "you"):
        copy = tmp_path / "hub" / f"datasets--{owner}--cats"
        (copy / "snapshots" / "1a").mkdir(parents=True)
        (copy / "blobs").mkdir()
        (copy / "blobs" / "77").write_bytes(jpeg(7))
        (copy / "snapshots" / "1a" / "a.jpg").symlink_to("../../blobs/77")
    load = datasets.load_dataset

    def of_the_hub(name: str, split: str):
        assert name == "me/cats"
        return load("parquet", data_files={split: str(tmp_path / "x.parquet")}, split=split)

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    name = f"{tmp_path}/hub/datasets--{{}}--cats/snapshots/1a/a.jpg"
    _write_names(tmp_path / "x.parquet", name.format("me"), name.format("you"))
    samples = iter(_open("hf:me/cats", **NAMED))
    assert _numbers([next(samples)]) == [7]
    with pytest.raises(UserError, match=r"row 1 names .*you.*is not in .*datasets--me--cats"):
        next(samples)


def test_names_that_are_numbers_are_in_their_order(tmp_path, caplog):
    names = [str(number) for number in range(12)]
    column = ([names[n % 12] for n in range(24)], datasets.Value("string"))
    _write(tmp_path / "x.parquet", 24, name=column)
    source = _open(tmp_path / "x.parquet", label_column="name")
    assert source.classes == tuple(names)
    assert not caplog.records
    column = ([n % 12 for n in range(24)], datasets.ClassLabel(names=sorted(names)))
    _write(tmp_path / "y.parquet", 24, number=column)
    assert _open(tmp_path / "y.parquet", label_column="number").classes[2] == "10"
    assert "class 10 has the label 2, so labels and names differ" in caplog.text
