import time

import numpy as np
import pytest

from rae_xla.data import storage
from rae_xla.data.order import SampleOrder
from rae_xla.data.read_ahead import GAP, LONGEST, ReadAhead, runs
from rae_xla.data.reader import SampleReader
from rae_xla.data.shards import ShardSample, write_shards

ORDERS = [
    SampleOrder(1437, 64, seed=0),
    SampleOrder(5003, 128, seed=3, block=80),
    SampleOrder(1000, 30, seed=2, block=7),
    SampleOrder(100, 16, shuffle=False),
]


@pytest.fixture
def sizes(tmp_path):
    """An index of samples of random bytes: small ones, and every seventh larger than the gap."""
    rng = np.random.default_rng(0)
    lengths = [2 * GAP if i % 7 == 3 else 1000 + i for i in range(60)]
    samples = [ShardSample(rng.bytes(length), "png", 0) for length in lengths]
    return write_shards(samples, str(tmp_path / "shards"), samples_per_shard=25)


def test_neighbours_are_one_range_and_far_ones_are_not(sizes):
    found = list(runs(sizes, np.array([5, 0, 1, 2, 4, 2])))
    # Between 2 and 4 lies 3, which is larger than the gap; between 4 and 5 a header or two.
    assert [run.samples.tolist() for run in found] == [[0, 1, 2], [4, 5]]
    assert all(run.shard is sizes.shards[0] for run in found)


def test_ranges_end_with_their_shard(sizes):
    found = list(runs(sizes, np.arange(60)))
    assert [run.shard.file for run in found] == [shard.file for shard in sizes.shards]
    assert np.concatenate([run.samples for run in found]).tolist() == list(range(60))


def test_ranges_are_not_too_long(sizes, monkeypatch):
    monkeypatch.setattr("rae_xla.data.read_ahead.LONGEST", 300_000)
    found = list(runs(sizes, np.arange(60)))
    assert max(run.length for run in found) <= 300_000 < LONGEST
    assert np.concatenate([run.samples for run in found]).tolist() == list(range(60))


def test_no_samples_no_ranges(sizes):
    assert list(runs(sizes, np.array([], np.int64))) == []


def test_what_is_expected_is_there_without_another_read(sizes, monkeypatch):
    monkeypatch.setattr(storage, "is_local_disk", lambda path: False)
    reader = SampleReader(sizes)
    reader.expect(3, np.array([0, 1, 2, 30]))
    expected = {i: storage.read_range(*place(sizes, i)) for i in (0, 1, 2, 30)}
    time.sleep(0.2)
    monkeypatch.setattr(storage, "read_range", None)
    for sample, content in expected.items():
        assert reader.image(3, sample) == content
    with pytest.raises(TypeError):  # it was given once; now it would be read
        reader.image(3, 0)
    reader.close()


def place(index, sample):
    row = index.samples[sample]
    return index.path_of(index.shard_of(sample)), int(row["offset"]), int(row["size"])


def test_what_could_not_be_read_ahead_is_none(sizes, monkeypatch):
    monkeypatch.setattr(storage, "is_local_disk", lambda path: False)
    ahead = ReadAhead(sizes)

    def fail(*args):
        raise OSError("no network")

    monkeypatch.setattr(storage, "read_range", fail)
    ahead.expect(0, np.array([1]))
    assert ahead.take(0, 1, 1001) is None
    assert ahead.take(0, 2, 1002) is None
    ahead.close()


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 16])
def test_an_order_tells_beforehand_what_its_rows_will_take(order, parts):
    """Whoever asks a step ahead knows every sample in time, and none that is not needed."""
    batch = order.global_batch_size
    for part in {0, parts - 1}:
        first, last = batch * part // parts, batch * (part + 1) // parts
        start = 3
        known, asked = set(), set()
        needed = {(0, s) for s in order.rows(start, first, last).tolist()}
        for step in range(start + 1, start + 2 * order.steps_per_epoch):
            for window, samples in order.ahead(step, first, last):
                if window not in asked:
                    asked.add(window)
                    known |= {(window[0], sample) for sample in samples.tolist()}
            taken = {(order.epoch(step), s) for s in order.rows(step, first, last).tolist()}
            assert taken <= known
            needed |= taken
        unused = {pair for pair in known - needed if pair[0] <= 1}
        assert not unused


def test_local_disks_are_told_from_buckets(tmp_path):
    assert storage.is_local_disk(str(tmp_path))
    assert not storage.is_local_disk("gs://bucket/folder")
