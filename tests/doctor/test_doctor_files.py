"""Places a run writes to, and shards it reads: good ones, and each kind of bad one."""

import os
from types import SimpleNamespace

import pytest
from tiny import IMAGES, make_configs, make_shards

from rae_xla.config import load_config
from rae_xla.doctor import files
from rae_xla.doctor.finding import Patient
from rae_xla.registry import instantiate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return make_configs(folder, make_shards(folder))


def patient(path, *overrides, results=None):
    return Patient(load_config(path and str(path), overrides=list(overrides)), bool(path), results)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_run_that_could_start_finds_all_in_order_and_nothing_is_left(world, tmp_path):
    results = tmp_path / "new" / "results"
    examined = patient(world["stage2"], f"data.cache_dir={tmp_path}", "data.cache_gb=0.001",
                       f"runtime.compile_cache={tmp_path}/cc", results=results)  # fmt: skip
    found = by_name(files.check_storage(examined))
    assert found.keys() == {"results", "checkpoints", "runtime.compile_cache", "data.cache_dir"}
    assert {finding.status for finding in found.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == [], "no folder was made, no file is left"
    data = by_name(files.check_data(examined))
    assert data["data.train"].status == "ok"
    assert f"{IMAGES} images of 4 classes in 3 shards" in data["data.train"].text


def test_a_place_that_cannot_be_written_fails(world, tmp_path):
    (tmp_path / "file").touch()
    found = by_name(files.check_storage(patient(world["stage2"], results=tmp_path / "file" / "r")))
    assert found["results"].status == "FAIL"
    assert "Not a directory" in found["results"].text or "is a file" in found["results"].text
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        found = by_name(files.check_storage(patient(world["stage2"], results=tmp_path / "locked")))
        assert "Permission denied" in found["results"].fix


def test_a_disk_that_will_be_too_small_is_told(world, tmp_path, monkeypatch):
    config = load_config(str(world["stage2"]))
    count = sum(p.numel() for p in instantiate(config.stage_2).parameters())
    assert files.trained_parameters(config) == count
    one = 16 * count  # weights, average and two moments in fp32
    monkeypatch.setattr(files, "SPARE", 0.0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=3.5 * one))
    # beside those that are kept one is being written
    for keep, status in ((2, "ok"), (3, "warn")):
        examined = patient(world["stage2"], f"checkpoint.keep_last={keep}", results=tmp_path)
        found = by_name(files.check_storage(examined))
        assert {name: f.status for name, f in found.items()} == {
            "results": "ok", "checkpoints": status,
        }  # fmt: skip
    assert "checkpoint.keep_last" in found["checkpoints"].fix


def test_a_decoder_is_counted_without_its_encoder(world):
    config = load_config(str(world["stage1"]))
    decoder = instantiate(config.stage_1).decoder
    assert files.trained_parameters(config) == sum(p.numel() for p in decoder.parameters())


def test_shards_that_cannot_be_read_fail_each_for_itself(world, tmp_path):
    good = load_config(str(world["stage2"])).data.train
    broken = make_shards(tmp_path)
    last = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    content = bytearray(last.read_bytes())
    content[-6000:-3000] = bytes(3000)
    last.write_bytes(content)
    nowhere = tmp_path / "nowhere"
    found = list(files.check_data(
        patient(world["stage2"], f"data.train=[{good},{nowhere},{broken}]", f"data.val={good}")
    ))  # fmt: skip
    assert [(f.name, f.status) for f in found] == [
        ("data.train", "ok"), ("data.train", "FAIL"), ("data.train", "FAIL"), ("data.val", "ok"),
    ]  # fmt: skip
    assert str(nowhere) in found[1].text
    assert str(broken) in found[2].text


def test_without_a_configuration_there_is_little_to_look_at():
    assert [f.status for f in files.check_storage(patient(None))] == ["none"]
    assert [f.status for f in files.check_data(patient(None))] == ["none"]
