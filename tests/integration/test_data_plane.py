"""Training on data that is faulty, mixed or cached, through the command line."""

import json
import os
import re

import pytest
import yaml
from tiny import make_configs, make_shards, metrics, rae_xla

from rae_xla.data.shards.index import open_index


@pytest.fixture
def world(tmp_path):
    shards = make_shards(tmp_path)
    return {"folder": tmp_path, "shards": shards, "configs": make_configs(tmp_path, shards)}


def train(world, name, *overrides):
    return rae_xla(
        "train", "stage2", "--config", world["configs"]["stage2"], "--results-dir",
        world["folder"] / name, "training.steps=8", "checkpoint.every_steps=8", *overrides,
    )  # fmt: skip


def garble(shards, sample):
    index = open_index(shards)
    with open(index.path_of(index.shard_of(sample)), "r+b") as file:
        file.seek(int(index.samples["offset"][sample]) + 30)
        file.write(b"\0\1\2\3")


def losses(folder):
    return [line["train/loss"] for line in metrics(folder)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_logged_and_counted(world, workers):
    garble(world["shards"], 5)
    options = ("data.max_bad_samples=0.5", f"data.num_workers={workers}")
    done = train(world, "run", *options)
    assert done.returncode == 0, done.stderr
    listed = [
        json.loads(line)
        for line in (world["folder"] / "run/bad_samples.jsonl").read_text().splitlines()
    ]
    assert {line["sample"] for line in listed} == {5}
    logged = re.findall(r"bad sample: .*shard-000000\.tar: sample 5 was changed", done.stderr)
    assert len(logged) == len(listed) >= 1
    assert metrics(world["folder"] / "run")[-1]["data/bad_samples"] == len(listed)
    again = train(world, "again", "data.max_bad_samples=0.5", "data.num_workers=1")
    assert again.returncode == 0
    assert losses(world["folder"] / "again") == losses(world["folder"] / "run")


def test_too_many_bad_samples_end_the_run(world):
    garble(world["shards"], 5)
    done = train(world, "run")
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert re.match(r"rae-xla: error: 1 bad sample among \d+ read, .*sample 5 was changed", error)
    assert "bad_samples.jsonl" in error


def test_overwritten_shards_are_found_before_the_run(world):
    index = open_index(world["shards"])
    garble(world["shards"], len(index) - 1)
    done = train(world, "run")
    assert done.returncode == 2
    assert "the index does not match its shards" in done.stderr
    assert not (world["folder"] / "run").exists()


def test_a_cache_does_not_change_the_run(world):
    clean = train(world, "clean")
    cache = f"data.cache_dir={world['folder'] / 'cache'}"
    first = train(world, "first", cache, "data.num_workers=2")
    assert clean.returncode == first.returncode == 0, first.stderr
    assert losses(world["folder"] / "first") == losses(world["folder"] / "clean")
    assert any((world["folder"] / "cache").rglob("*.val"))


def test_several_sources(world, tmp_path):
    (tmp_path / "second").mkdir()
    second = make_shards(tmp_path / "second")
    sources = f"data.train=[{world['shards']},{second}]"
    done = train(world, "run", sources, "data.weights=[3,1]")
    assert done.returncode == 0, done.stderr
    assert f"of each 8 rows, 6 from {world['shards']}, 2 from {second}" in done.stderr
    saved = yaml.safe_load((world["folder"] / "run/config.yaml").read_text())
    assert saved["data"]["train"] == [world["shards"], second]
    other = train(world, "run", "training.steps=16", sources)
    assert other.returncode == 2
    assert "has checkpoints of a run on other training data" in other.stderr
    os.rename(second, tmp_path / "moved")
    gone = train(world, "gone", sources)
    assert gone.returncode == 2
    assert "no such folder" in gone.stderr
