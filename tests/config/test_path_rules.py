"""Paths: one reading for every path that the command line or a configuration gives."""

from __future__ import annotations

import pickle

import pytest

from rae_xla.config import load_config
from rae_xla.config.paths import (
    ANYWHERE,
    LOCAL,
    LOCAL_OR_HUB,
    StoragePath,
    parse_path,
    path_setting,
)
from rae_xla.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("shards", "shards"),
        ("./a/b/", "./a/b"),
        ("/", "/"),
        ("/data/x", "/data/x"),
        ("file:///data/x", "/data/x"),
        ("a:b", "a:b"),
        ("hf:owner/name", "hf:owner/name"),
        ("x-{0000..0012}.tar", "x-{0000..0012}.tar"),
        ("./None", "./None"),
        ("gs://bucket", "gs://bucket"),
        ("gs://bucket/", "gs://bucket"),
        ("gs://bucket//a///b/", "gs://bucket/a/b"),
        ("gs://my-bucket.example/a b/ü", "gs://my-bucket.example/a b/ü"),
    ],
)
def test_normal_form(given, parsed):
    path = parse_path(given, "--out")
    assert path == parsed
    assert isinstance(path, StoragePath)
    assert parse_path(path, "--out") == path, "parsing twice changes nothing"
    assert path.is_remote == parsed.startswith("gs://")


def test_home_folders_are_expanded(home):
    assert parse_path("~/x", "--out") == f"{home}/x"
    assert parse_path("~", "--out") == str(home)
    assert parse_path("a/~", "--out") == "a/~"
    with pytest.raises(UserError, match=r"--out: ~nobody-xyz/a: there is no home folder"):
        parse_path("~nobody-xyz/a", "--out")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("None", "'None' is text here"),
        ("null", "write null"),
        ("a\nb", "control character"),
        ("a\0b", "control character"),
        ("s3://bucket/x", "s3:// is not supported: give a path that is local or gs://"),
        ("hf://owner/name", "hf:// is not supported"),
        ("https://host/x", "https:// is not supported"),
        ("GS://bucket/x", "GS:// is not supported"),
        ("gs:/bucket/x", "gs:/ is not supported"),
        ("file://host/x", "file:// is not supported"),
        ("x/gs://bucket", "a scheme in its middle"),
        ("gs://", "names no bucket"),
        ("gs:///x", "names no bucket"),
        ("gs://a b/x", "names no bucket"),
        ("gs://bucket/../x", "no folders . and .."),
    ],
)
def test_rejected_paths(given, reason):
    with pytest.raises(UserError, match=r"^checkpoint\.dir") as error:
        parse_path(given, "checkpoint.dir")
    assert reason in str(error.value)


def test_rules():
    assert parse_path("gs://bucket/x", "--out", ANYWHERE).is_remote
    with pytest.raises(UserError, match=r"gs:// is not supported here: give a path that is local "):
        parse_path("gs://bucket/x", "--out", LOCAL)
    with pytest.raises(UserError, match="local or hub id"):
        parse_path("s3://bucket/x", "--rae", LOCAL_OR_HUB)
    assert parse_path("owner/name", "--rae", LOCAL_OR_HUB) == "owner/name"


def test_parts():
    local, remote = StoragePath("/runs/a.npz"), StoragePath("gs://bucket/runs/a.npz")
    for path in (local, remote):
        assert (path.name, path.suffix, path.parent.name) == ("a.npz", ".npz", "runs")
        assert path.parent / "a.npz" == path
        assert pickle.loads(pickle.dumps(path)) == path
    assert StoragePath("gs://bucket").name == ""
    assert StoragePath("gs://bucket").parent == "gs://bucket"
    assert StoragePath("gs://bucket/x").parent == "gs://bucket"
    assert StoragePath("x").parent == "."


def test_paths_of_a_configuration(home, tmp_path):
    config = load_config(
        None,
        [
            "data.train=[~/a,gs://bucket//b/]",
            "checkpoint.dir=gs://bucket/run/",
            "weights.vgg16=~/vgg.pth",
            "stage_1={target: RAE, params: {encoder_params: {dinov2_path: ~/encoder}}}",
        ],
    )
    assert config.data.train == (f"{home}/a", "gs://bucket/b")
    assert config.checkpoint.dir == "gs://bucket/run"
    assert config.weights.vgg16 == f"{home}/vgg.pth"
    assert config.stage_1.params["encoder_params"] == {"dinov2_path": f"{home}/encoder"}
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("path", ["2024", "on", "1e5", "a #1", "[a]", "{a}", "a: b", "a=b", "ü'\""])
def test_an_option_that_sets_a_path_is_not_read_as_yaml(path):
    assert load_config(None, [path_setting("data.train", path)]).data.train == path


def test_relative_paths_stay_relative(monkeypatch, tmp_path):
    """Otherwise the identity of a run would depend on the working directory."""
    monkeypatch.chdir(tmp_path)
    assert load_config(None, ["weights.vgg16=models/vgg.pth"]).weights.vgg16 == "models/vgg.pth"


def test_a_base_in_the_home_folder(home, tmp_path):
    home.mkdir()
    (home / "base.yaml").write_text("training: {epochs: 3}")
    (tmp_path / "run.yaml").write_text("base: ~/base.yaml")
    assert load_config("~/../run.yaml").training.epochs == 3
    (tmp_path / "other.yaml").write_text("training: {steps: 4}")
    assert load_config(tmp_path / "other.yaml", ["base=~/base.yaml"]).training.epochs == 3


@pytest.mark.parametrize("key", ["tracking.name", "training.steps", "transport.params.loss_weight"])
def test_none_as_text_is_not_null(key):
    with pytest.raises(UserError, match=rf"^{key} .*write null"):
        load_config(None, [f"{key}=None"])


def test_a_published_last_step_of_none():
    assert load_config(None, ["sampler.params.last_step=None"]).sampler.params.last_step is None
