"""The doctor's look at a bucket: reachable, writable, clean afterwards, and its clock."""

import time

import pytest

from rae_xla.config import load_config
from rae_xla.data import storage
from rae_xla.data.sources import array_source
from rae_xla.doctor import files
from rae_xla.doctor.finding import Patient


def examine(check, *overrides):
    patient = Patient(load_config(None, overrides=list(overrides)), True, None)
    return {finding.name: finding for finding in check(patient)}


def test_a_bucket_is_written_to_and_left_as_it_was(bucket):
    found = examine(files.check_storage, f"checkpoint.dir={bucket}/checkpoints")
    assert found["checkpoints"].status == "ok"
    assert "written, read and deleted" in found["checkpoints"].text
    assert found["clock"].status == "ok"
    assert storage.list_files(f"{bucket}/checkpoints") == {}


def test_a_clock_that_is_wrong_is_told(bucket, monkeypatch):
    clock = time.time
    monkeypatch.setattr(files.time, "time", lambda: clock() - 300)
    found = examine(files.check_storage, f"checkpoint.dir={bucket}/checkpoints")
    monkeypatch.undo()
    assert found["clock"].status == "warn"
    assert "-30" in found["clock"].text or "-29" in found["clock"].text


def test_a_bucket_that_is_not_there_fails(gcs):
    found = examine(files.check_storage, "checkpoint.dir=gs://no-such-bucket/checkpoints")
    assert found["checkpoints"].status == "FAIL"
    assert "gs://no-such-bucket/checkpoints cannot be written" in found["checkpoints"].fix


def test_shards_in_a_bucket_are_read(bucket):
    import numpy as np

    from rae_xla.data.shards import write_shards

    images = np.zeros((5, 16, 16, 3), dtype=np.uint8)
    write_shards(array_source(images, np.arange(5)), f"{bucket}/shards", samples_per_shard=3)
    settings = [f"data.train={bucket}/shards", "data.image_size=16"]
    assert examine(files.check_data, *settings)["data.train"].status == "ok"
    storage.remove(f"{bucket}/shards/{shard_of(bucket)}")
    assert examine(files.check_data, *settings)["data.train"].status == "FAIL"


def shard_of(bucket):
    return next(name for name in storage.list_files(f"{bucket}/shards") if name.endswith(".tar"))


@pytest.mark.usefixtures("gcs")
def test_a_server_that_does_not_answer_fails(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    finding = files._server_clock()
    assert finding.status == "FAIL"
    assert "http://localhost:1 does not answer" in finding.fix
