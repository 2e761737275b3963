"""Many steps from a faulty bucket: the same batches, in constant memory."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from photographs import write_photographs

from rae_xla.data.bad_samples import BadSampleLog
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.shards.index import open_index
from rae_xla.data.transforms import ResizeRandomCrop

pytestmark = pytest.mark.slow

BATCH = 8

FAULTS = {
    "503": {"probability": 1 / 200},
    "429": {"probability": 1 / 1000},
    "disconnect": {"probability": 1 / 300, "after_bytes": 1000},
    "truncate": {"probability": 1 / 300, "after_bytes": 1000},
    "stall": {"probability": 1 / 1000, "after_bytes": 1000},
}


def batches(index, workers, bad=None):
    loader = TrainingLoader(
        index, seed=2, global_batch_size=BATCH, transform=ResizeRandomCrop(16, fast=True),
        num_workers=workers, flip=True, prefetch=4, bad_samples=bad,
    )  # fmt: skip
    return loader.batches()


def digest(batch):
    parts = (batch[name].numpy().tobytes() for name in ("image", "label", "index"))
    return hashlib.sha256(b"".join(parts)).digest()


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("steps", "warm_up"), [(1_200, 400), pytest.param(10_000, 2_000, marks=pytest.mark.nightly)]
)
def test_batches_and_memory_over_many_steps(gcs, bucket, tmp_path, monkeypatch, steps, warm_up):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "1")
    write_photographs(bucket, count=200, size=(40, 30), samples_per_shard=50)
    clean = write_photographs(
        str(tmp_path / "shards"), count=200, size=(40, 30), samples_per_shard=50
    )
    index = open_index(bucket)
    for number, (kind, options) in enumerate(FAULTS.items()):
        gcs.inject("GET /download", kind=kind, seed=number, **options)

    bad = BadSampleLog(max_fraction=0)
    faulty, expected = batches(index, 2, bad), batches(clean, 0)
    resident: dict[int, int] = {}
    for step, (batch, clean_batch) in enumerate(zip(faulty, expected, strict=True), start=1):
        assert digest(batch) == digest(clean_batch), step
        if step == warm_up:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            pids = [os.getpid(), *(worker.pid for worker in workers)]
            resident = {pid: resident_bytes(pid) for pid in pids}
        if step == steps:
            break
    grown = {pid: resident_bytes(pid) / before - 1 for pid, before in resident.items()}
    faulty.close()
    expected.close()

    faults = gcs.stats()["faults"]
    print(faults, gcs.stats()["requests"], grown)
    assert set(faults) == set(FAULTS)
    assert min(faults.values()) >= max(1, steps // 5_000)
    assert bad.count == 0
    assert max(grown.values()) < 0.05
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []
