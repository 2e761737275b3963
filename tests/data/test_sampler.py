"""The sampling order: permutations, topologies, and values pinned across versions."""

import numpy as np
import pytest

from rae_xla.data.counter_rng import Purpose, counter_hash, uniform
from rae_xla.data.sampler import BatchSampler, block_size
from rae_xla.errors import UserError

SAMPLERS = [
    BatchSampler(100, 16, seed=1),
    BatchSampler(1437, 64, seed=0),
    BatchSampler(1000, 30, seed=2, block=7),
    BatchSampler(5003, 128, seed=3, block=80),
    BatchSampler(97, 97, seed=4, block=10),
    BatchSampler(100, 16, shuffle=False),
]


def _epoch(sampler: BatchSampler, epoch: int) -> np.ndarray:
    steps = sampler.steps_per_epoch
    rows = [
        sampler.sample_ids(epoch * steps + k, 0, sampler.global_batch_size) for k in range(steps)
    ]
    return np.concatenate(rows)


PINNED = {
    "first step": [930, 1100, 571, 1270, 401, 672],
    "far step": [109, 635, 1043, 1015, 921, 324],
    "blocks": [774283, 774236, 1154405, 1154416, 89940, 1154427],
    "hash": [2797369506347349652, 6809857304325929543],
}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_an_epoch_has_every_sample_once_except_for_the_last_partial_batch(sampler):
    for epoch in (0, 1, 5):
        ids = _epoch(sampler, epoch)
        assert (
            len(ids) == sampler.num_samples // sampler.global_batch_size * sampler.global_batch_size
        )
        assert len(np.unique(ids)) == len(ids)
        assert ids.min() >= 0
        assert ids.max() < sampler.num_samples


@pytest.mark.parametrize("sampler", SAMPLERS[:4], ids=str)
def test_epochs_and_seeds_differ_and_so_do_the_samples_left_out(sampler):
    first, second = _epoch(sampler, 0), _epoch(sampler, 1)
    other = BatchSampler(
        sampler.num_samples, sampler.global_batch_size, sampler.seed + 1, sampler.block
    )
    assert (first == second).mean() < 0.05
    assert (first == _epoch(other, 0)).mean() < 0.05
    assert set(first.tolist()) != set(second.tolist())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("parts", [2, 3, 4, 16])
def test_rows_are_the_same_for_any_division(sampler, parts):
    cuts = [sampler.global_batch_size * i // parts for i in range(parts + 1)]
    for step in (0, 1, 2 * sampler.steps_per_epoch + 3):
        expected = sampler.sample_ids(step, 0, sampler.global_batch_size)
        pieces = [
            sampler.sample_ids(step, cuts[i], cuts[i + 1]) for i in range(parts) if cuts[i + 1]
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_the_order_never_changes_between_versions():
    """A run of an earlier version must resume with its very next sample."""
    sampler = BatchSampler(1437, 64, seed=42)
    assert sampler.sample_ids(0, 0, 6).tolist() == PINNED["first step"]
    assert sampler.sample_ids(10**9, 58, 64).tolist() == PINNED["far step"]
    blocks = BatchSampler(1_281_167, 1024, seed=42, block=78)
    assert blocks.sample_ids(123_456, 500, 506).tolist() == PINNED["blocks"]
    numbers = counter_hash(42, Purpose.FLIP, 3, np.arange(2, dtype=np.int64)).tolist()
    assert numbers == PINNED["hash"]


def test_without_shuffle_ids_count_up():
    assert _epoch(BatchSampler(10, 3, shuffle=False), 4).tolist() == list(range(9))


def test_small_sets_have_blocks_of_one_sample_and_large_ones_of_a_few_mib():
    assert block_size(1437, 1437 * 300) == 1
    assert block_size(30_000, 30_000 * 100_000) == 1
    assert block_size(1_281_167, 1_281_167 * 110_000) == 76  # 8 MiB of ImageNet
    assert block_size(1_281_167, 1_281_167 * 20_000) == 78
    assert block_size(100_000_000, 100_000_000 * 8_000_000) == 1


def test_a_small_set_is_shuffled_uniformly():
    """Samples adjacent in the index are adjacent in an epoch with a probability of 2 / n."""
    sampler = BatchSampler(1000, 50, seed=9)
    epochs = [_epoch(sampler, epoch) for epoch in range(40)]
    adjacent = np.mean([(np.abs(np.diff(ids)) == 1).mean() for ids in epochs])
    assert adjacent == pytest.approx(2 / 1000, rel=0.3)
    position = np.stack([np.argsort(ids) for ids in epochs])  # of every sample in every epoch
    spread = position.mean(axis=0).std() / (1000 / np.sqrt(12) / np.sqrt(40))
    assert spread == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("batch", "streams"),
    [
        (1, 1),
        (6, 6),
        (64, 64),
        (77, 77),
        (179, 179),
        (250, 50),
        (1000, 50),
        (1021, 1021),
        (1024, 64),
    ],
)
def test_any_batch_size_has_about_64_streams_and_limited_windows(batch, streams):
    sampler = BatchSampler(200_000, batch, seed=0, block=80)
    assert sampler.streams == streams
    assert sampler.streams * sampler.window <= 64 * 320
    blocks = sampler.sample_ids(3, 0, batch) // 80
    assert len(np.unique(blocks)) > 0.8 * min(batch, 64)


def test_blocks_are_mixed_within_and_across_batches():
    """A batch of a large data set has samples of many blocks rather than a few complete blocks."""
    sampler = BatchSampler(200_000, 1024, seed=0, block=80)
    for step in (0, 7, 100):
        blocks = sampler.sample_ids(step, 0, 1024) // 80
        assert len(np.unique(blocks)) > 2 * sampler.streams


def test_a_range_of_rows_reads_few_blocks():
    """In an epoch, one of 8 hosts reads an eighth of the blocks."""
    sampler = BatchSampler(200_000, 1024, seed=0, block=80)
    ids = np.concatenate(
        [sampler.sample_ids(step, 0, 128) for step in range(sampler.steps_per_epoch)]
    )
    assert len(np.unique(ids // 80)) < 1.1 * 200_000 / 80 / 8


def test_the_data_set_must_fill_a_batch():
    with pytest.raises(UserError, match="50 samples, fewer than one global batch of 64"):
        BatchSampler(50, 64)


def test_uniforms_are_uniform_and_independent_of_each_other():
    ids = np.arange(100_000, dtype=np.int64)
    x, y = uniform(0, Purpose.CROP_X, 0, ids), uniform(0, Purpose.CROP_Y, 0, ids)
    later = uniform(0, Purpose.CROP_X, 1, ids)
    assert x.min() >= 0
    assert x.max() < 1
    assert np.histogram(x, 20, (0, 1))[0] == pytest.approx(5000, rel=0.06)
    for other in (y, later, np.roll(x, 1)):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.02
