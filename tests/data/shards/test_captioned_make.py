"""``shards make`` and ``index`` for images with captions: tars, parquet, saved data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_captions import captioned_members, png, write_tar

from rae_xla.cli.main import main
from rae_xla.data.reader import read_image
from rae_xla.data.shards.encoding import ORIGINALS
from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.sample_filter import SampleFilter
from rae_xla.data.shards.sources import open_captioned_source
from rae_xla.data.shards.texts import open_texts
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import make_shards
from rae_xla.errors import UserError


def shards(*arguments: object) -> None:
    assert main(["shards", *map(str, arguments)]) == 0


def pairs(folder: Path) -> dict[bytes, dict]:
    """Return the texts of every image of a folder of shards."""
    index = open_index(str(folder))
    texts = open_texts(str(folder), len(index))
    return {read_image(index, i): dict(texts[i]) for i in range(len(index))}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_tar(tmp_path / "tars/a.tar", captioned_members(6))
    return tmp_path / "tars"


def test_tars_without_labels_are_taken_for_captions(tars: Path, tmp_path: Path, capsys) -> None:
    shards("index", tars, "--out", tmp_path / "index", "--max-chars", 13)
    output = capsys.readouterr().out
    assert "4 images with captions" in output
    assert "2 samples: the caption is longer than 13 characters" in output
    shards("captions", tars, "--out", tmp_path / "alias", "--max-chars", 13)
    assert pairs(tmp_path / "alias") == pairs(tmp_path / "index")


def test_made_shards_have_the_pairs_of_their_source(tars: Path, tmp_path: Path, capsys) -> None:
    shards("index", tars, "--out", tmp_path / "index")
    shards("make", tars, tmp_path / "made", "--samples-per-shard", 4)
    assert pairs(tmp_path / "made") == pairs(tmp_path / "index")
    assert verify(str(tmp_path / "made")) == []
    # the written tars can be indexed again
    shards("index", tmp_path / "made", "--out", tmp_path / "again")
    assert pairs(tmp_path / "again") == pairs(tmp_path / "index")


def test_an_interrupted_make_resumes_with_the_same_bytes(tars: Path, tmp_path: Path) -> None:
    source, _ = open_captioned_source(str(tars), encoding=ORIGINALS, accept=SampleFilter())
    make_shards(source, str(tmp_path / "whole"), samples_per_shard=2)

    def stop(samples, done):
        for number, sample in enumerate(samples):
            if number == 3:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        make_shards(source, str(tmp_path / "parts"), samples_per_shard=2, progress=stop)
    make_shards(source, str(tmp_path / "parts"), samples_per_shard=2)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name


def dataset_of(count: int):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [
            {"bytes": png((10 * i, 90, 60), i, 24 + 8 * i), "path": None} for i in range(count)
        ],
        "caption": ["" if i == 3 else f"square {i}" for i in range(count)],
        "score": [float(i) for i in range(count)],
    }
    features = datasets.Features(
        image=datasets.Image(decode=False),
        caption=datasets.Value("string"),
        score=datasets.Value("float64"),
    )
    table = datasets.Dataset.from_dict(rows, features).cast_column("image", datasets.Image())
    return rows, table


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_give_the_right_pairs(kind: str, tmp_path: Path, capsys) -> None:
    rows, table = dataset_of(5)
    source = tmp_path / "source"
    if kind == "parquet":
        source.mkdir()
        table.to_parquet(str(source / "train-0.parquet"))
    else:
        table.save_to_disk(str(source))
    options = ("--captions", "--min-side", 32, "--score", "json.score", "--min-score", 2)
    shards("make", source, tmp_path / "made", *options)
    output = capsys.readouterr().out
    assert "1 sample: the image is smaller than 32 pixels" in output
    assert "1 sample: json.score is missing or below 2" in output
    found = pairs(tmp_path / "made")
    assert found == {
        rows["image"][i]["bytes"]: {
            "json": {"caption": rows["caption"][i], "score": rows["score"][i]}
        }
        for i in (2, 4)  # the caption of 3 is empty
    }
    only = tmp_path / "only"
    shards("make", source, only, "--captions", "--caption-columns", "caption")
    assert "1 sample: the caption is missing or too short" in capsys.readouterr().out
    assert all(list(t["json"]) == ["caption"] for t in pairs(only).values())
    assert len(pairs(only)) == 4


def test_wrong_options_are_one_error(tars: Path, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"caption": "x"}) + "\n")
    source = {"encoding": ORIGINALS, "accept": SampleFilter()}
    with pytest.raises(UserError, match=r"shards index .*a\.jsonl --images FOLDER"):
        open_captioned_source(str(lines), **source)
    with pytest.raises(UserError, match="--caption-columns are for data sets"):
        open_captioned_source(str(tars), caption_columns=["x"], **source)
    write_tar(tmp_path / "none/a.tar", [m for m in captioned_members(3) if "png" in m[0]])
    with pytest.raises(UserError, match="3 samples: the caption is missing or too short"):
        open_captioned_source(str(tmp_path / "none"), **source)
