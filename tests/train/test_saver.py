"""Saving beside the training: what is kept, what a failure costs, and that it costs no step."""

import time
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import LinearStage, make_saver, one_process, save

from rae_xla.config import CheckpointConfig
from rae_xla.data import storage
from rae_xla.interop.checkpoint_folder import list_checkpoints, read_manifest, rests, verify
from rae_xla.interop.checkpoint_tensors import read_parts
from rae_xla.train import saver as saving
from rae_xla.train.state import make_state

pytestmark = pytest.mark.unhurried


def steps(folder):
    return [checkpoint.step for checkpoint in list_checkpoints(str(folder))]


@pytest.fixture(params=["a disk", "a bucket"])
def folder(request, tmp_path):
    if request.param == "a disk":
        return str(tmp_path / "checkpoints")
    return request.getfixturevalue("run_folder")


def test_the_last_and_every_so_many_are_kept(folder):
    for step in range(10, 80, 10):
        save(folder, step, keep_last=2, keep_every=30)
    assert steps(folder) == [30, 60, 70]


def test_a_later_one_that_is_broken_takes_no_ones_place(folder):
    for step in (10, 30):
        save(folder, step)
    save(folder, 20, keep_last=2)
    assert steps(folder) == [10, 20, 30]


def test_the_manifest_says_what_the_run_was_and_comes_last(folder):
    checkpoint = save(folder, 40)
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest)
    assert manifest["step"] == manifest["data"]["position"] == 40
    assert manifest["seed"] == 0
    assert manifest["data"]["fingerprint"] == "data"
    assert manifest["scheduler"] == {"next_step": {"lr": 0.5}}
    assert manifest["config"]["training"]["ema_decay"] == 0.9995
    assert manifest["written_by"] == {"backend": "torch", "mesh": "data=1 x fsdp=1", "processes": 1}
    assert manifest["code"].startswith("rae_xla ")
    there = storage.list_files(checkpoint.path)
    assert set(there) == {"manifest.json", *manifest["files"]}
    storage.remove(storage.join(checkpoint.path, "manifest.json"))
    assert steps(folder) == []


def test_what_broken_off_saves_left_is_cleared_away(folder):
    save(folder, 10)
    for name in ("step-00000020", "step-00000030.unfinished"):
        storage.make_folder(storage.join(folder, name))
        storage.write_bytes(storage.join(folder, name + "/ema-0.distcp"), b"half")
    assert steps(folder) == [10]
    assert len(rests(folder)) == 2
    save(folder, 20)
    assert rests(folder) == []
    assert steps(folder) == [10, 20]


def test_a_step_saved_again_replaces_what_was_there(folder):
    save(folder, 10, LinearStage(seed=1))
    later = LinearStage(seed=2)
    checkpoint = save(folder, 10, later)
    verify(checkpoint, read_manifest(checkpoint))
    found = read_parts(checkpoint, ["model"])["model"]
    assert torch.equal(found["published.0.weight"], later.model.state_dict()["0.weight"])


def state_and_saver(folder, lines, step=lambda: 10, **settings):
    stage = LinearStage()
    state = make_state(stage.model, one_process())
    config = replace(CheckpointConfig(), **settings)
    return state, make_saver(folder, stage, state, lines.append, config, step)


def test_training_goes_on_while_it_is_written(storage_server, run_folder, monkeypatch):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "60")
    monkeypatch.setattr(saving, "PATIENCE", 0.1)
    lines = []
    state, saver = state_and_saver(run_folder, lines)
    weight = state.model.module[0].weight
    before = weight.detach().clone()
    storage_server.inject(match="POST /upload", kind="stall")
    assert saver.start(10)
    with torch.no_grad():
        weight += 1
    assert steps(run_folder) == []
    assert not saver.start(20)
    assert lines == [
        "step 20: no checkpoint, the one before it is still being written; "
        "checkpoint.every_steps asks for them faster than the storage takes them"
    ]
    assert saver.take_figures().keys() == {"ckpt/blocked_seconds"}
    storage_server.clear_faults()
    saver.wait()
    [checkpoint] = list_checkpoints(run_folder)
    assert checkpoint.step == 10
    found = read_parts(checkpoint, ["model"])["model"]
    assert torch.equal(found["published.0.weight"], before)
    assert saver.take_figures()["ckpt/seconds"] > 0


def test_a_bucket_that_is_away_costs_no_step_and_is_tried_again(
    storage_server, run_folder, monkeypatch
):
    monkeypatch.setattr(saving, "FIRST_RETRY", 0.2)
    lines = []
    save(run_folder, 5)
    _, saver = state_and_saver(run_folder, lines)
    storage_server.inject(match="POST /upload", kind="503")
    assert saver.start(10)
    saver.wait()
    assert saver.failure is not None
    assert len(lines) == 1
    assert lines[0].startswith("step 10: the checkpoint could not be written: gs://runs/")
    assert steps(run_folder) == [5]
    assert saver.take_figures()["ckpt/failed"] == 1
    deadline = time.monotonic() + 30
    while not saver.retry_due and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saver.retry_due
    storage_server.clear_faults()
    assert saver.start(10)
    saver.wait()
    assert saver.failure is None
    assert not saver.retry_due
    assert steps(run_folder) == [5, 10]


def test_the_last_save_is_tried_again_until_it_succeeds(storage_server, run_folder):
    lines = []
    _, saver = state_and_saver(run_folder, lines)
    # gs:// gives up after several tries by itself: these are more
    storage_server.inject(match="POST /upload", kind="503", times=30)
    assert saver.finish(10, patience=100)
    assert len(lines) >= 1
    assert steps(run_folder) == [10]
    assert saver.finish(10, patience=0), "it is there"


def test_a_disk_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    lines = []
    _, saver = state_and_saver(tmp_path / "checkpoints", lines)
    assert not saver.finish(10, patience=0)
    assert "checkpoints" in saver.failure
    assert lines == [f"step 10: the checkpoint could not be written: {saver.failure}"]


def test_old_ones_that_cannot_be_deleted_fail_no_save(tmp_path, monkeypatch):
    save(tmp_path, 10)
    lines = []
    _, saver = state_and_saver(tmp_path, lines, step=lambda: 20, keep_last=1)

    def refuse(path):
        raise OSError(1, "Operation not permitted", path)

    monkeypatch.setattr(storage, "remove", refuse)
    assert saver.finish(20, patience=0)
    assert steps(tmp_path) == [10, 20]
    assert "old checkpoints could not be deleted" in lines[0]
