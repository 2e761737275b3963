"""Checks of the storage that a run writes to and the shards that it reads."""

import os
from types import SimpleNamespace

import pytest
from tiny import IMAGES, make_configs, make_shards
from tiny_captions import make_captioned_shards, make_config

from rae_xla.config import load_config
from rae_xla.interop.instantiate import instantiate
from rae_xla.tools.doctor import files
from rae_xla.tools.doctor.finding import DoctorContext
from rae_xla.train.text_to_image_model import build_model, freeze


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    return make_configs(folder, make_shards(folder))


def make_context(path, *overrides, results=None):
    config = load_config(path and str(path), overrides=list(overrides))
    return DoctorContext(config, bool(path), results)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_valid_run_passes_and_no_file_is_left(configs, tmp_path):
    results = tmp_path / "new" / "results"
    context = make_context(configs["stage2"], f"data.cache_dir={tmp_path}", "data.cache_gb=0.001",
                       f"runtime.compile_cache={tmp_path}/cc", results=results)  # fmt: skip
    found = by_name(files.check_storage(context))
    assert found.keys() == {"results", "checkpoints", "runtime.compile_cache", "data.cache_dir"}
    assert {finding.status for finding in found.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == [], "no folder was created, no file is left"
    data = by_name(files.check_data(context))
    assert data["data.train"].status == "ok"
    assert f"{IMAGES} images of 4 classes in 3 shards" in data["data.train"].text


def test_a_folder_that_cannot_be_written_fails(configs, tmp_path):
    (tmp_path / "file").touch()
    found = by_name(
        files.check_storage(make_context(configs["stage2"], results=tmp_path / "file" / "r"))
    )
    assert found["results"].status == "FAIL"
    assert "Not a directory" in found["results"].text or "is not a folder" in found["results"].text
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        found = by_name(
            files.check_storage(make_context(configs["stage2"], results=tmp_path / "locked"))
        )
        assert "Permission denied" in found["results"].fix


def test_a_disk_that_is_too_small_is_a_warning(configs, tmp_path, monkeypatch):
    config = load_config(str(configs["stage2"]))
    count = sum(p.numel() for p in instantiate(config.stage_2).parameters())
    assert files.trained_parameters(config) == count
    checkpoint = 16 * count  # bytes of weights, average and two moments in fp32
    monkeypatch.setattr(files, "MIN_FREE_BYTES", 0.0)
    monkeypatch.setattr(
        files.shutil, "disk_usage", lambda _: SimpleNamespace(free=3.5 * checkpoint)
    )
    # in addition to those that are kept, one is being written
    for keep, status in ((2, "ok"), (3, "warn")):
        context = make_context(configs["stage2"], f"checkpoint.keep_last={keep}", results=tmp_path)
        found = by_name(files.check_storage(context))
        assert {name: f.status for name, f in found.items()} == {
            "results": "ok", "checkpoints": status,
        }  # fmt: skip
    assert "checkpoint.keep_last" in found["checkpoints"].fix


def test_parameters_of_stage_1_are_those_of_the_decoder(configs):
    config = load_config(str(configs["stage1"]))
    decoder = instantiate(config.stage_1).decoder
    assert files.trained_parameters(config) == sum(p.numel() for p in decoder.parameters())


def test_each_unreadable_data_set_fails(configs, tmp_path):
    good = load_config(str(configs["stage2"])).data.train
    broken = make_shards(tmp_path)
    last = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    content = bytearray(last.read_bytes())
    content[-6000:-3000] = bytes(3000)
    last.write_bytes(content)
    missing = tmp_path / "missing"
    found = list(files.check_data(
        make_context(
            configs["stage2"], f"data.train=[{good},{missing},{broken}]", f"data.val={good}"
        )
    ))  # fmt: skip
    assert [(f.name, f.status) for f in found] == [
        ("data.train", "ok"), ("data.train", "FAIL"), ("data.train", "FAIL"), ("data.val", "ok"),
    ]  # fmt: skip
    assert str(missing) in found[1].text
    assert str(broken) in found[2].text


def test_a_text_to_image_run_is_checked(tmp_path):
    path = make_config(tmp_path, make_captioned_shards(tmp_path, count=6))
    [found] = files.check_data(make_context(path))
    assert found.status == "ok"
    assert "6 samples with texts, first and last tokenised" in found.text
    override = "text_to_image.train=[head]"
    model = build_model(load_config(path, overrides=[override]), channels=32, tokens=16)
    freeze(model, ("head",))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert files.trained_parameters(load_config(path, overrides=[override])) == trained
    [found] = files.check_data(make_context(path, f"text_to_image.tokenizer={tmp_path}"))
    assert found.status == "FAIL"
    assert "tokenizer.json does not exist" in found.text
    [found] = files.check_data(make_context(path, f"data.train={make_shards(tmp_path)}"))
    assert "has no captions" in found.fix


def test_without_a_configuration_the_checks_are_skipped():
    assert [f.status for f in files.check_storage(make_context(None))] == ["none"]
    assert [f.status for f in files.check_data(make_context(None))] == ["none"]
