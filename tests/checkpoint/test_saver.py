"""Asynchronous saving: retention, retries, and training that does not wait for the storage."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import LinearTask, logged, make_saver, one_process, save

from rae_xla import storage
from rae_xla.checkpoint import saver as saver_module
from rae_xla.checkpoint.manager import (
    incomplete_checkpoints,
    list_checkpoints,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.checkpoint.tensors import read_parts
from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import CheckpointConfig
from rae_xla.runtime import waiting

pytestmark = pytest.mark.slow


def steps(folder):
    return [checkpoint.step for checkpoint in list_checkpoints(str(folder))]


@pytest.fixture(params=["a disk", "a bucket"])
def folder(request, tmp_path):
    if request.param == "a disk":
        return str(tmp_path / "checkpoints")
    return request.getfixturevalue("run_folder")


def test_keep_last_and_keep_every(folder):
    for step in range(10, 80, 10):
        save(folder, step, keep_last=2, keep_every=30)
    assert steps(folder) == [30, 60, 70]


def test_checkpoints_of_later_steps_do_not_count(folder):
    for step in (10, 30):
        save(folder, step)
    save(folder, 20, keep_last=2)
    assert steps(folder) == [10, 20, 30]


def test_the_manifest_records_the_run_and_commits_it(folder):
    checkpoint = save(folder, 40)
    manifest = read_checkpoint_manifest(checkpoint)
    verify(checkpoint, manifest)
    assert manifest["step"] == manifest["data"]["position"] == 40
    assert manifest["seed"] == 0
    assert manifest["data"]["fingerprint"] == "data"
    assert manifest["scheduler"] == {"next_step": {"lr": 0.5}}
    assert manifest["config"]["training"]["ema_decay"] == 0.9995
    assert manifest["written_by"] == {"backend": "torch", "mesh": "data=1 x fsdp=1", "processes": 1}
    assert manifest["code"].startswith("rae_xla ")
    files = storage.list_files(checkpoint.path)
    assert set(files) == {"manifest.json", *manifest["files"]}
    storage.remove(storage.join(checkpoint.path, "manifest.json"))
    assert steps(folder) == []


def test_incomplete_checkpoints_are_deleted(folder):
    save(folder, 10)
    for name in ("step-00000020", "step-00000030.unfinished"):
        storage.make_folder(storage.join(folder, name))
        storage.write_bytes(storage.join(folder, name + "/ema-0.distcp"), b"half")
    assert steps(folder) == [10]
    assert len(incomplete_checkpoints(folder)) == 2
    save(folder, 20)
    assert incomplete_checkpoints(folder) == []
    assert steps(folder) == [10, 20]


def test_saving_a_step_again_replaces_its_checkpoint(folder):
    save(folder, 10, LinearTask(seed=1))
    later = LinearTask(seed=2)
    checkpoint = save(folder, 10, later)
    verify(checkpoint, read_checkpoint_manifest(checkpoint))
    found = read_parts(checkpoint, ["model"])["model"]
    assert torch.equal(found["published.0.weight"], later.model.state_dict()["0.weight"])


def state_and_saver(folder, step=lambda: 10, **settings):
    task = LinearTask()
    state = make_state(task.model, one_process())
    config = replace(CheckpointConfig(), **settings)
    return state, make_saver(folder, task, state, config, step)


def test_training_continues_during_a_save(storage_server, run_folder, monkeypatch, caplog):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "60")
    monkeypatch.setattr(saver_module, "BUSY_TIMEOUT", 0.1)
    state, saver = state_and_saver(run_folder)
    weight = state.model.module[0].weight
    before = weight.detach().clone()
    storage_server.inject(match="POST /upload", kind="stall")
    assert saver.start(10)
    with torch.no_grad():
        weight += 1
    assert steps(run_folder) == []
    assert not saver.start(20)
    [warning] = logged(caplog)
    assert warning.startswith("step 20: no checkpoint")
    assert "checkpoint.every_steps" in warning
    assert saver.take_metrics().keys() == {"ckpt/blocked_seconds"}
    monkeypatch.setattr(waiting, "FIRST_NOTICE", 0.05)
    threading.Timer(0.5, storage_server.clear_faults).start()
    saver.wait()
    assert f"waiting until the checkpoint that is being written to {run_folder}" in caplog.text
    [checkpoint] = list_checkpoints(run_folder)
    assert checkpoint.step == 10
    found = read_parts(checkpoint, ["model"])["model"]
    assert torch.equal(found["published.0.weight"], before)
    assert saver.take_metrics()["ckpt/seconds"] > 0


def test_an_unreachable_bucket_is_retried(storage_server, run_folder, monkeypatch, caplog):
    monkeypatch.setattr(saver_module, "MIN_RETRY_DELAY", 0.2)
    save(run_folder, 5)
    _, saver = state_and_saver(run_folder)
    storage_server.inject(match="POST /upload", kind="503")
    assert saver.start(10)
    saver.wait()
    assert saver.failure is not None
    [warning] = logged(caplog)
    assert warning.startswith("step 10: the checkpoint could not be written: gs://runs/")
    assert steps(run_folder) == [5]
    assert saver.take_metrics()["ckpt/failed"] == 1
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


def test_finish_retries_until_it_succeeds(storage_server, run_folder, caplog):
    _, saver = state_and_saver(run_folder)
    # more failures than the retries of a single request to gs://
    storage_server.inject(match="POST /upload", kind="503", times=30)
    assert saver.finish(10, timeout=100)
    assert len(logged(caplog)) >= 1
    assert steps(run_folder) == [10]
    assert saver.finish(10, timeout=0), "it exists already"


def test_finish_reports_a_disk_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("a file in the way")
    _, saver = state_and_saver(tmp_path / "checkpoints")
    assert not saver.finish(10, timeout=0)
    assert "checkpoints" in saver.failure
    assert logged(caplog) == [f"step 10: the checkpoint could not be written: {saver.failure}"]


def test_a_failure_to_delete_old_checkpoints_is_logged(tmp_path, monkeypatch, caplog):
    save(tmp_path, 10)
    _, saver = state_and_saver(tmp_path, step=lambda: 20, keep_last=1)

    def refuse(path):
        raise OSError(1, "Operation not permitted", path)

    monkeypatch.setattr(storage, "remove", refuse)
    assert saver.finish(20, timeout=0)
    assert steps(tmp_path) == [10, 20]
    assert "old checkpoints could not be deleted" in logged(caplog)[0]
