"""Ten thousand steps from a bucket that misbehaves: the batches of a clean run, in flat memory."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from photographs import write_photographs

from rae_xla.data.faults import BadSamples
from rae_xla.data.index import open_index
from rae_xla.data.stream import SampleStream
from rae_xla.data.transforms import ResizeRandomCrop

pytestmark = pytest.mark.slow

BATCH, STEPS, WARM_UP = 8, 10_000, 2_000

FAULTS = {  # of every so many requests
    "503": {"probability": 1 / 200},
    "429": {"probability": 1 / 1000},
    "disconnect": {"probability": 1 / 300, "after_bytes": 1000},
    "truncate": {"probability": 1 / 300, "after_bytes": 1000},
    "stall": {"probability": 1 / 1000, "after_bytes": 1000},
}


def batches(index, workers, bad=None):
    stream = SampleStream(
        index, seed=2, global_batch_size=BATCH, transform=ResizeRandomCrop(16, fast=True),
        num_workers=workers, flip=True, prefetch=4, bad_samples=bad,
    )  # fmt: skip
    return stream.batches()


def digest(batch):
    parts = (batch[name].numpy().tobytes() for name in ("image", "label", "index"))
    return hashlib.sha256(b"".join(parts)).digest()


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(1200)
def test_ten_thousand_steps(gcs, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "1")
    write_photographs(bucket, count=200, size=(40, 30), samples_per_shard=50)
    clean = write_photographs(
        str(tmp_path / "shards"), count=200, size=(40, 30), samples_per_shard=50
    )
    index = open_index(bucket)
    for number, (kind, how) in enumerate(FAULTS.items()):
        gcs.inject("GET /download", kind=kind, seed=number, **how)

    bad = BadSamples(max_fraction=0)
    faulty, expected = batches(index, 2, bad), batches(clean, 0)
    resident: dict[int, int] = {}
    for step, (ours, theirs) in enumerate(zip(faulty, expected, strict=True), start=1):
        assert digest(ours) == digest(theirs), step
        if step == WARM_UP:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            pids = [os.getpid(), *(worker.pid for worker in workers)]
            resident = {pid: resident_bytes(pid) for pid in pids}
        if step == STEPS:
            break
    grown = {pid: resident_bytes(pid) / before - 1 for pid, before in resident.items()}
    faulty.close()
    expected.close()

    struck = gcs.stats()["faults"]
    print(struck, gcs.stats()["requests"], grown)
    assert set(struck) == set(FAULTS)
    assert min(struck.values()) >= 2
    assert bad.count == 0
    assert max(grown.values()) < 0.05
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []
