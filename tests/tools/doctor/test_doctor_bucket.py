"""The doctor's checks of a bucket: access, no leftover files, and the clock."""

import time

import numpy as np
import pytest

from rae_xla import storage
from rae_xla.config import load_config
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.tools.doctor import files
from rae_xla.tools.doctor.finding import DoctorContext


def findings_of(check, *overrides):
    """Return the findings of a check by name."""
    context = DoctorContext(load_config(None, overrides=list(overrides)), True, None)
    return {finding.name: finding for finding in check(context)}


def test_a_bucket_is_written_to_and_left_unchanged(bucket):
    found = findings_of(files.check_storage, f"checkpoint.dir={bucket}/checkpoints")
    assert found["checkpoints"].status == "ok"
    assert "written, read and deleted" in found["checkpoints"].text
    assert found["clock"].status == "ok"
    assert storage.list_files(f"{bucket}/checkpoints") == {}


def test_a_wrong_clock_is_a_warning(bucket, monkeypatch):
    clock = time.time
    monkeypatch.setattr(files.time, "time", lambda: clock() - 300)
    found = findings_of(files.check_storage, f"checkpoint.dir={bucket}/checkpoints")
    monkeypatch.undo()
    assert found["clock"].status == "warn"
    assert "-30" in found["clock"].text or "-29" in found["clock"].text


def test_a_missing_bucket_fails(gcs):
    found = findings_of(files.check_storage, "checkpoint.dir=gs://no-such-bucket/checkpoints")
    assert found["checkpoints"].status == "FAIL"
    assert "gs://no-such-bucket/checkpoints" in found["checkpoints"].fix


def test_shards_in_a_bucket_are_read(bucket):
    images = np.zeros((5, 16, 16, 3), dtype=np.uint8)
    write_shards(array_source(images, np.arange(5)), f"{bucket}/shards", samples_per_shard=3)
    settings = [f"data.train={bucket}/shards", "data.image_size=16"]
    assert findings_of(files.check_data, *settings)["data.train"].status == "ok"
    names = storage.list_files(f"{bucket}/shards")
    shard = next(name for name in names if name.endswith(".tar"))
    storage.remove(f"{bucket}/shards/{shard}")
    assert findings_of(files.check_data, *settings)["data.train"].status == "FAIL"


@pytest.mark.usefixtures("gcs")
def test_a_server_that_does_not_respond_fails(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    finding = files._server_clock()
    assert finding.status == "FAIL"
    assert "http://localhost:1 does not respond" in finding.fix
