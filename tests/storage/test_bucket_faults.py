"""Objects that are overwritten, or that a bucket does not deliver, while a run reads them."""

import json
import time
from itertools import islice

import pytest
import torch
from numbered import numbered_arrays

from rae_xla import storage
from rae_xla.data.bad_samples import BadSampleLog
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import write_shards
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.storage.cache import RangeCache

pytestmark = pytest.mark.slow

BATCH = 16


@pytest.fixture
def index(bucket, monkeypatch):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "0.3")
    source = array_source(*numbered_arrays(100), shuffle=False)
    write_shards(source, bucket, classes=source.classes, samples_per_shard=30)
    return open_index(bucket)


def take_batches(index, file=None, workers=0, limit=1.0, cache=None, steps=12):
    bad = BadSampleLog(file, max_fraction=limit)
    loader = TrainingLoader(
        index, seed=5, global_batch_size=BATCH, transform=CenterCrop(8), num_workers=workers,
        cache=cache, bad_samples=bad,
    )  # fmt: skip
    batches = loader.batches()
    taken = list(islice(batches, steps))
    batches.close()
    return taken, bad


def assert_replaced(batches, clean, file, lost, shard):
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["shard"] for line in listed} == {shard}
    seen = 0
    for before, after in zip(clean, batches, strict=True):
        for row, old in enumerate(before["index"].tolist()):
            if old in lost:
                seen += 1
                assert int(after["index"][row]) not in lost
            else:
                assert torch.equal(after["image"][row], before["image"][row])
    assert seen
    assert {line["sample"] for line in listed} <= set(lost)
    return listed


@pytest.mark.parametrize("workers", [0, 2])
def test_an_object_overwritten_since_the_index_was_opened(index, tmp_path, workers):
    """Reads are pinned to the listed generation, even if the new bytes are the same."""
    clean, _ = take_batches(index)
    shard = index.path_of(index.shards[3])
    storage.write_bytes(shard, storage.read_bytes(shard))
    file = tmp_path / "bad.jsonl"
    batches, bad = take_batches(index, file, workers)
    listed = assert_replaced(batches, clean, file, range(90, 100), shard)
    assert bad.count == len(listed)
    assert all("disappeared or was overwritten" in line["reason"] for line in listed)
    assert open_index(index.folder).generations != index.generations


def test_an_object_overwritten_before_the_run_is_an_error(index):
    shard = index.path_of(index.shards[3])
    content = storage.read_bytes(shard)
    storage.write_bytes(shard, content[:-1] + b"\1")
    with pytest.raises(UserError, match=r"shard-000003\.tar was overwritten: its MD5 is"):
        open_index(index.folder)
    faults = verify(index.folder)
    assert {fault.file for fault in faults} == {"shard-000003.tar"}  # its checksum and its end


@pytest.mark.parametrize(
    "kind",
    [
        "503",
        pytest.param("stall", marks=pytest.mark.slow),
        pytest.param("disconnect", marks=pytest.mark.slow),
    ],
)
def test_an_object_that_is_never_delivered(index, gcs, tmp_path, kind):
    clean, _ = take_batches(index)
    gcs.inject(r"GET /download.*shard-000003", kind=kind)
    file, begin = tmp_path / "bad.jsonl", time.monotonic()
    batches, _ = take_batches(index, file, workers=1)
    listed = assert_replaced(batches, clean, file, range(90, 100), index.path_of(index.shards[3]))
    assert all("cannot be read: " in line["reason"] for line in listed)
    assert time.monotonic() - begin < 60


def test_transient_faults_leave_no_trace(index, gcs):
    clean, _ = take_batches(index)
    gcs.inject("GET /download", kind="503", times=12)
    gcs.inject("GET /download", kind="stall", times=2)
    batches, bad = take_batches(index, workers=2, limit=0)
    assert bad.count == 0
    for batch, expected in zip(batches, clean, strict=True):
        assert torch.equal(batch["image"], expected["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_ends_does_not_wait_for_a_bucket(index, gcs, monkeypatch, workers):
    monkeypatch.delenv("RAE_XLA_GCS_TIMEOUT")  # 20 seconds
    loader = TrainingLoader(
        index, seed=5, global_batch_size=BATCH, transform=CenterCrop(8), num_workers=workers
    )
    batches = loader.batches()
    next(batches)
    gcs.inject("GET /download", kind="stall")
    time.sleep(0.5)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 10  # less than the timeout of a request


def test_a_bucket_that_delivers_nothing_ends_the_run(index, gcs, caplog, monkeypatch):
    # Another timeout means another client, whose next warning is not suppressed.
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "0.31")
    gcs.inject("GET /download", kind="503")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^gs://.*: 3 samples in a row .*cannot be read: .*503"):
        take_batches(index)
    assert time.monotonic() - begin < 30  # three reads, each tried for 1 s
    assert any("trying again" in record.getMessage() for record in caplog.records)


def test_a_missing_bucket(gcs):
    with pytest.raises(OSError, match="there is no bucket 'nowhere'; create it, or correct its"):
        storage.write_bytes("gs://nowhere/file", b"content")


def test_cached_pieces_are_not_requested_again(index, gcs, tmp_path):
    cache = RangeCache(str(tmp_path / "cache"), 10**9)
    cache.prepare()
    clean, _ = take_batches(index)
    take_batches(index, workers=2, cache=cache)
    before = gcs.stats()["media_gets"]
    batches, _ = take_batches(index, workers=2, cache=cache)
    assert gcs.stats()["media_gets"] == before
    for batch, expected in zip(batches, clean, strict=True):
        assert torch.equal(batch["image"], expected["image"])
