"""Read-ahead: requests for adjacent samples, and samples announced in time."""

import time

import numpy as np
import pytest

from rae_xla import storage
from rae_xla.data.reader import MAX_GAP, MAX_REQUEST_BYTES, ReadAhead, SampleReader, read_requests
from rae_xla.data.sampler import BatchSampler
from rae_xla.data.shards.encoding import ShardSample
from rae_xla.data.shards.writer import write_shards

SAMPLERS = [
    BatchSampler(1437, 64, seed=0),
    BatchSampler(5003, 128, seed=3, block=80),
    BatchSampler(1000, 30, seed=2, block=7),
    BatchSampler(100, 16, shuffle=False),
]


@pytest.fixture
def index(tmp_path):
    """Return an index of random bytes: small samples, and every seventh larger than the gap."""
    rng = np.random.default_rng(0)
    lengths = [2 * MAX_GAP if i % 7 == 3 else 1000 + i for i in range(60)]
    samples = [ShardSample(rng.bytes(length), "png", 0) for length in lengths]
    return write_shards(samples, str(tmp_path / "shards"), samples_per_shard=25)


def test_adjacent_samples_are_one_request_and_distant_ones_are_not(index):
    requests = list(read_requests(index, np.array([5, 0, 1, 2, 4, 2])))
    # Sample 3, between 2 and 4, is larger than the gap; between 4 and 5 there are only headers.
    assert [request.samples.tolist() for request in requests] == [[0, 1, 2], [4, 5]]
    assert all(request.shard is index.shards[0] for request in requests)


def test_requests_end_with_their_shard(index):
    requests = list(read_requests(index, np.arange(60)))
    assert [request.shard.file for request in requests] == [shard.file for shard in index.shards]
    assert np.concatenate([request.samples for request in requests]).tolist() == list(range(60))


def test_requests_are_not_too_long(index, monkeypatch):
    monkeypatch.setattr("rae_xla.data.reader.MAX_REQUEST_BYTES", 300_000)
    requests = list(read_requests(index, np.arange(60)))
    assert max(request.length for request in requests) <= 300_000 < MAX_REQUEST_BYTES
    assert np.concatenate([request.samples for request in requests]).tolist() == list(range(60))


def test_no_samples_no_requests(index):
    assert list(read_requests(index, np.array([], np.int64))) == []


def test_samples_read_ahead_are_loaded_without_another_read(index, monkeypatch):
    monkeypatch.setattr(storage, "is_local_disk", lambda path: False)
    reader = SampleReader(index)
    reader.read_ahead(3, np.array([0, 1, 2, 30]))
    expected = {i: storage.read_range(*location(index, i)) for i in (0, 1, 2, 30)}
    time.sleep(0.2)
    monkeypatch.setattr(storage, "read_range", None)
    for sample, content in expected.items():
        assert reader.encoded(3, sample) == content
    with pytest.raises(TypeError):  # it was taken already, so it would be read again
        reader.encoded(3, 0)
    reader.close()


def location(index, sample):
    row = index.samples[sample]
    return index.path_of(index.shard_of(sample)), int(row["offset"]), int(row["size"])


def test_a_sample_that_could_not_be_read_ahead_is_none(index, monkeypatch):
    monkeypatch.setattr(storage, "is_local_disk", lambda path: False)
    ahead = ReadAhead(index)

    def fail(*args):
        raise OSError("no network")

    monkeypatch.setattr(storage, "read_range", fail)
    ahead.start(0, np.array([1]))
    assert ahead.take(0, 1, 1001) is None
    assert ahead.take(0, 2, 1002) is None
    ahead.close()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 16])
def test_a_sampler_announces_the_samples_of_its_rows(sampler, parts):
    """One step ahead, every sample is known in time, and none that is not needed."""
    batch = sampler.global_batch_size
    for part in {0, parts - 1}:
        first, last = batch * part // parts, batch * (part + 1) // parts
        start = 3
        known, windows = set(), set()
        needed = {(0, s) for s in sampler.sample_ids(start, first, last).tolist()}
        for step in range(start + 1, start + 2 * sampler.steps_per_epoch):
            for window, samples in sampler.upcoming(step, first, last):
                if window not in windows:
                    windows.add(window)
                    known |= {(window[0], sample) for sample in samples.tolist()}
            taken = {
                (sampler.epoch(step), s) for s in sampler.sample_ids(step, first, last).tolist()
            }
            assert taken <= known
            needed |= taken
        unused = {pair for pair in known - needed if pair[0] <= 1}
        assert not unused


def test_local_disks_are_distinguished_from_buckets(tmp_path):
    assert storage.is_local_disk(str(tmp_path))
    assert not storage.is_local_disk("gs://bucket/folder")
